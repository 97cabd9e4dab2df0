"""The medium model of CS336's size comparison: d_model 1024, d_ff 4096, 24 layers, 16 heads."""

vocab_source = "bpe"
vocab_size = 10000
dim = 1024
hidden_dim = 4096
n_layers = 24
n_heads = 16
arch = "llama"
tie_embeddings = False
max_seq_len = 256
batch_size = 32
max_iters = 100000
eval_interval = 2000
