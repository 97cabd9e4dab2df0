"""
The lowest loss in ten minutes on two CPU cores, as measured by experiments/speedrun.py: run it with
--max_minutes=10. These are train.py's defaults.
"""

vocab_size = 4096
dim = 256
n_layers = 4
n_heads = 4
max_seq_len = 4096
batch_size = 2
arch = "modded"
warmup_iters = 0
cooldown_frac = 0.6
cooldown_shape = "linear"
compile = "True"
