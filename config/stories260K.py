"""The shape of llama2.c's smallest model, 260,032 parameters."""

vocab_size = 512
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
multiple_of = 4
max_seq_len = 512
batch_size = 128
arch = "llama"  # modded learns faster but has several times the parameters
max_iters = 100000
eval_interval = 2000
