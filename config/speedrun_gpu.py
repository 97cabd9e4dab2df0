"""
A good model of all of TinyStories on one GPU: 78 million parameters, 50 million of them in lookup
tables. Written for a GPU; not run on one yet.
"""

vocab_size = 4096
dim = 512
n_layers = 8
n_heads = 4
max_seq_len = 1024
sliding_window = 128
window_pattern = "SSSL"
separate_documents = False  # not tried on a GPU yet
bigram_rows = 65536
vocab_multiple = 128
batch_size = 64
max_iters = 10000
eval_interval = 500
warmup_iters = 0
muon_beta2 = 0.95  # 0.99 was only measured with small batches
muon_weight_decay = 0.0  # the text is read once or twice
cooldown_frac = 0.6
cooldown_shape = "linear"
