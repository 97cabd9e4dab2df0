"""The tiny model of CS336's size comparison: d_model 512, d_ff 1344, 4 layers, 16 heads."""

vocab_source = "bpe"
vocab_size = 10000
dim = 512
hidden_dim = 1344
n_layers = 4
n_heads = 16
arch = "llama"
tie_embeddings = False
max_seq_len = 256
batch_size = 64
max_iters = 100000
eval_interval = 2000
