"""
What the plain recipe has after ten minutes, in twenty seconds on two CPU cores: a small model, of
which more steps fit into the time, not compiled, which would take longer than it saves.
experiments/speedrun.py measures it.
"""

vocab_size = 4096
dim = 128
n_layers = 2
n_heads = 2
max_seq_len = 128
batch_size = 16
arch = "modded"
sliding_window = 0
embedding_lr = 0.1
bigram_lr = 0.01
warmup_iters = 0
cooldown_frac = 0.6
cooldown_shape = "linear"
compile = "False"
