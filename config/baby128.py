"""
BabyLlama with 128 tokens, about one per letter: 11 million parameters (6 with --arch=llama).
"""

vocab_size = 128
dim = 288
n_layers = 6
n_heads = 6
max_seq_len = 256
sliding_window = 128  # tokens, about as many letters
window_pattern = "SSSL"
batch_size = 32
gradient_accumulation_steps = 4
max_iters = 2000
eval_interval = 100
# as this recipe was tuned; today's defaults were not tried with letters
head_lr = 0.012
muon_beta2 = 0.95
muon_weight_decay = 0.0
