"""
The 105-token recipe of TinyStoriesModal: one token per letter, 3 million parameters (1 million with
--arch=llama).
"""

vocab_size = 105
dim = 128
n_layers = 5
n_heads = 8
n_kv_heads = 4
max_seq_len = 256
sliding_window = 128  # letters
window_pattern = "SSSL"
batch_size = 32
max_iters = 2000
# as this recipe was tuned; today's defaults were not tried with letters
head_lr = 0.012
muon_beta2 = 0.95
muon_weight_decay = 0.0
