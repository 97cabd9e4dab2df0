"""
Reach the plain recipe's ten-minute loss in twenty seconds on two CPU cores, as measured by
experiments/speedrun.py: run it with --max_minutes=0.3333. The model is small, so that more steps
fit into the time, and not compiled, because compiling would take longer than it saves. So few steps
need high learning rates and little momentum.
"""

vocab_size = 4096
dim = 128
n_layers = 2
n_heads = 2
max_seq_len = 128
batch_size = 8
arch = "modded"
sliding_window = 0
embedding_lr = 0.1
bigram_lr = 0.02
head_lr = 0.02
scalar_lr = 0.03
momentum = 0.9
muon_beta1 = 0.6
muon_weight_decay = 0.0  # 0.1 costs 0.001 bits per byte in so short a run
warmup_iters = 0
cooldown_frac = 0.6
cooldown_shape = "linear"
compile = "False"
