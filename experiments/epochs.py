"""
What helps when text is short? 1.1 MB of text, 276,000 tokens of a vocabulary for more text, read
four or eight times. Use any text instead of data/TinyStories.txt; valid.txt may be longer:

    mkdir short && cp data/tok4096.model short
    head -c 1100000 data/TinyStories.txt > short.txt
    python tinystories.py pretokenize --data_dir=short --source=short.txt --valid_source=valid.txt
    python sweep.py experiments/epochs.py --data_dir=short
"""

title = "A short text, read four and eight times"
# the dial's rates for a run of this length with enough text
base = (
    "config/speedrun_cpu.py --dim=128 --n_heads=2 --max_seq_len=512 --sliding_window=128 "
    "--batch_size=4 --max_iters=540 --head_lr=0.011 --embedding_lr=0.08 --bigram_lr=0.013 "
    "--scalar_lr=0.02 --momentum=0.915 --muon_beta1=0.65 --muon_weight_decay=0"
)
runs = (
    "recipe:;"
    "head: --head_lr=0.0055;"
    "decay: --muon_weight_decay=0.3;"
    "tables: --bigram_rows=0 --embedding_weight_decay=0.5;"
    "dropout: --dropout=0.1;"
    "all: --head_lr=0.0055 --muon_weight_decay=0.3 --bigram_rows=0 --embedding_weight_decay=0.5 "
    "--dropout=0.1;"
    "recipe-8: --max_iters=1080;"
    "all-8: --max_iters=1080 --head_lr=0.0055 --muon_weight_decay=0.3 --bigram_rows=0 "
    "--embedding_weight_decay=0.5 --dropout=0.1"
)
evals = 6
eval_windows = 1000  # or all of a shorter validation text
