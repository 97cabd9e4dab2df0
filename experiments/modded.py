"""
Shared settings of the experiments on sizes and vocabularies: modded architecture, Muon. They are
those of the measured runs; train.py's defaults have changed since.
"""

arch = "modded"
dim = 128
n_layers = 4
n_heads = 4
vocab_size = 1024
bigram_rows = 4096
max_seq_len = 256
sliding_window = 64
window_pattern = "SSSL"
embedding_conv = 0
key_conv = 0
separate_documents = False
batch_size = 8
head_lr = 0.012
muon_beta2 = 0.95
muon_weight_decay = 0.0
dtype = "float32"
compile = "False"  # not worth it for runs of a minute or two
log_interval = 5
