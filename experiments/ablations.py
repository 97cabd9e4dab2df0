"""
What each option is worth: the ten-minute recipe for two cores with one choice changed, and plain
Llama with one option added (`llama+...`, compared with `llama`). All runs get equal arithmetic; for
equal text, add --equal_flops=0 --equal_bytes=3100000 and another --out_dir. To add an option, add a
row.
"""

title = "What each option is worth"
# short runs need smaller steps and a higher rate of the head than ten-minute runs
base = "config/speedrun_cpu.py --batch_size=1 --head_lr=0.012"
runs = """
recipe:
no-qk_norm: --qk_norm=False
norm_gains: --norm_gains=True
untied: --tie_embeddings=False
swiglu: --activation=swiglu
no-embedding_norm: --embedding_norm=False
no-residual_scalars: --residual_scalars=False
no-bigram: --bigram_rows=0
no-window: --sliding_window=0
no-value_embeddings: --value_embeddings=0
no-smear: --smear=False
no-neuron_beta: --neuron_beta=0
no-momentum_warmup: --momentum_warmup=0
no-grad_clip: --grad_clip=0
adamw-6e-3: --optimizer=adamw --base_learning_rate=6e-3 --warmup_iters=20
zero_init: --zero_init=True
softcap: --logit_softcap=15
dropout: --dropout=0.1
no-decay: --muon_weight_decay=0
bigram-4096: --bigram_rows=4096
window-128: --sliding_window=128
full-layers: --window_pattern=SSSL
joined-documents: --separate_documents=False
no-embedding_conv: --embedding_conv=0
no-key_conv: --key_conv=0
no-convs: --embedding_conv=0 --key_conv=0
heads-2: --n_heads=2
hidden_lr-0.01: --hidden_lr=0.01
hidden_lr-0.04: --hidden_lr=0.04
cosine: --cooldown_shape=cosine
batch-2: --batch_size=2
context-1024: --max_seq_len=1024 --batch_size=4
vocab-2048: --vocab_size=2048
vocab-8192: --vocab_size=8192
portable: --arch=portable
llama: --arch=llama
llama+qk_norm: --arch=llama --qk_norm=True
llama+no-norm_gains: --arch=llama --norm_gains=False
llama+relu2: --arch=llama --activation=relu2
llama+embedding_norm: --arch=llama --embedding_norm=True
llama+residual_scalars: --arch=llama --residual_scalars=True
llama+value_embeddings: --arch=llama --value_embeddings=-1
llama+bigram: --arch=llama --bigram_rows=16384
llama+smear: --arch=llama --smear=True
llama+window: --arch=llama --sliding_window=256
llama+separate_documents: --arch=llama --separate_documents=True
"""
equal_flops = 2.2e13  # about 800,000 tokens of the recipe, a minute on two cores
evals = 1
eval_windows = 2000  # or all of a shorter validation text
