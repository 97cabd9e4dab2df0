"""The shape of llama2.c's smallest model; with --arch=llama its 260,000 parameters."""

vocab_size = 512
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
multiple_of = 4
max_seq_len = 512
batch_size = 128
max_iters = 100000
eval_interval = 2000
