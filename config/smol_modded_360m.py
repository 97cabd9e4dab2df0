"""
The data of smol_llama_360m.py, 6 billion tokens of FineWeb, with this project's architecture and
optimizer. Written for GPUs; not trained yet.
"""

data_dir = "data/fineweb-6b"
vocab_source = "bpe"
vocab_size = 49152
out_dir = "out/smol_modded_360m"
arch = "modded"
dim = 960
n_layers = 32
n_heads = 15
n_kv_heads = 5
hidden_dim = 3840  # ReLU²: two matrices with the parameters of SwiGLU's three of 2,560
max_seq_len = 2048
sliding_window = 512
window_pattern = "SSSL"
separate_documents = False  # not tried on a GPU yet
value_embeddings = 2  # each is a table with 49,152 rows
bigram_rows = 65536
batch_size = 64
gradient_accumulation_steps = 8
optimizer = "muon"
max_iters = 5725
warmup_iters = 0
muon_beta2 = 0.95  # 0.99 was only measured with small batches
muon_weight_decay = 0.0  # the text is read once
cooldown_frac = 0.6
cooldown_shape = "linear"
final_lr_frac = 0.0
activation_checkpointing = "block"
eval_interval = 200
eval_iters = 20
log_interval = 1
resume = "auto"
