"""The shape of llama2.c's 42-million-parameter model, with Llama 2's vocabulary."""

vocab_source = "llama2"
vocab_size = 32000
dim = 512
n_layers = 8
n_heads = 8
max_seq_len = 1024
batch_size = 32
gradient_accumulation_steps = 4
arch = "llama"  # modded learns faster but has several times the parameters
max_iters = 100000
eval_interval = 2000
