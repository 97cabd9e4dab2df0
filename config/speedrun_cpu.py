"""The lowest loss in ten minutes on two CPU cores, as measured by experiments/speedrun.py."""

vocab_size = 4096
dim = 256
n_layers = 4
n_heads = 2
max_seq_len = 1024
batch_size = 8
arch = "modded"
warmup_iters = 0
cooldown_frac = 0.6
cooldown_shape = "linear"
compile = "True"
