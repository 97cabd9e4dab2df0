"""
smol-llama's 360M model and recipe, plain Llama on 6 billion tokens of FineWeb. To get the data, run
`python webtext.py prepare --source=fineweb-6b`. Embedding and head are tied, as in SmolLM-360M;
smol-llama's code has a separate head (--tie_embeddings=False), which adds to the 360 million.
"""

data_dir = "data/fineweb-6b"
vocab_source = "bpe"
vocab_size = 49152
out_dir = "out/smol_llama_360m"
arch = "llama"
dim = 960
n_layers = 32
n_heads = 15
n_kv_heads = 5
hidden_dim = 2560
max_seq_len = 2048
# 64 x 8 x 2,048: a million tokens per step; train.py fits the micro-batch to the memory
batch_size = 64
gradient_accumulation_steps = 8
optimizer = "adamw"
base_learning_rate = 3e-4
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.01
grad_clip = 1.0
max_iters = 5725
warmup_iters = 900
cooldown_frac = 1.0
cooldown_shape = "cosine"
final_lr_frac = 0.1
activation_checkpointing = "block"
eval_interval = 200
eval_iters = 20
log_interval = 1
resume = "auto"
