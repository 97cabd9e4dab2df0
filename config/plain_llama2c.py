"""The recipe of llama2.c's train.py: the baseline of experiments/speedrun.py."""

vocab_size = 4096
dim = 288
n_layers = 6
n_heads = 6
max_seq_len = 256
batch_size = 16
arch = "llama"
optimizer = "adamw"
base_learning_rate = 1e-3
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
grad_clip = 1.0
warmup_iters = 100
cooldown_frac = 1.0
cooldown_shape = "cosine"
final_lr_frac = 0.0
dtype = "float32"
compile = "True"
