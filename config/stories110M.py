"""The shape of llama2.c's 110-million-parameter model, with Llama 2's vocabulary."""

vocab_source = "llama2"
vocab_size = 32000
dim = 768
n_layers = 12
n_heads = 12
max_seq_len = 1024
batch_size = 32
gradient_accumulation_steps = 4
arch = "llama"  # modded learns faster but has several times the parameters
max_iters = 200000
eval_interval = 2000
