"""The small model of CS336's size comparison: d_model 768, d_ff 3072, 12 layers, 12 heads."""

vocab_source = "bpe"
vocab_size = 10000
dim = 768
hidden_dim = 3072
n_layers = 12
n_heads = 12
arch = "llama"
tie_embeddings = False
max_seq_len = 256
batch_size = 64
max_iters = 100000
eval_interval = 2000
