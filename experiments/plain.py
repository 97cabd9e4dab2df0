"""Shared settings of the plain Llama experiments: 0.9 million parameters, AdamW, cosine."""

arch = "llama"
dim = 128
n_layers = 4
n_heads = 4
vocab_size = 1024
max_seq_len = 256
batch_size = 8
optimizer = "adamw"
base_learning_rate = 3e-3
weight_decay = 0.1
warmup_iters = 20
cooldown_frac = 1.0
cooldown_shape = "cosine"
final_lr_frac = 0.1
# of the Muon runs in optimizer.py, as they were measured
head_lr = 0.012
muon_beta2 = 0.95
muon_weight_decay = 0.0
dtype = "float32"
compile = "False"  # not worth it for runs of a minute
log_interval = 5
