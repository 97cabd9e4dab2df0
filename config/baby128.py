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
head_lr = 0.012  # this and muon_beta2: lower and 0.99 were not tried with letters
muon_beta2 = 0.95
eval_interval = 100
