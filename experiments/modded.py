"""What the experiments with this project's own recipe share: the modded architecture and Muon."""

arch = "modded"
dim = 128
n_layers = 4
n_heads = 4
vocab_size = 1024
bigram_rows = 4096
max_seq_len = 256
batch_size = 8
dtype = "float32"
compile = "False"  # runs of a minute or two do not repay it
log_interval = 5
