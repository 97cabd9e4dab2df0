"""The large model of CS336's size comparison: d_model 1280, d_ff 5120, 36 layers, 20 heads."""

vocab_source = "bpe"
vocab_size = 10000
dim = 1280
hidden_dim = 5120
n_layers = 36
n_heads = 20
arch = "llama"
tie_embeddings = False
max_seq_len = 256
batch_size = 8
max_iters = 100000
eval_interval = 2000
