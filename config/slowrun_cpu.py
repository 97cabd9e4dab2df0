"""
What --minutes=60 chooses on two CPU cores for 13.7 MB of text, which it reads five times: larger
than the default recipe, without bigrams, and with more weight decay.
"""

vocab_size = 4096
dim = 384
n_layers = 6
n_heads = 6
max_seq_len = 4096
batch_size = 4
arch = "modded"
bigram_rows = 0
muon_weight_decay = 0.2
embedding_weight_decay = 0.5
max_iters = 1126
eval_interval = 188
warmup_iters = 0
cooldown_frac = 0.6
cooldown_shape = "linear"
compile = "True"
