"""The shape of llama2.c's 15-million-parameter model, with Llama 2's vocabulary."""

vocab_source = "llama2"
vocab_size = 32000
dim = 288
n_layers = 6
n_heads = 6
max_seq_len = 256
batch_size = 128
gradient_accumulation_steps = 4
arch = "llama"  # modded learns faster but has several times the parameters
max_iters = 100000
eval_interval = 2000
