"""
What helps when text is short? A text of 1.1 MB, 276,000 tokens, read four or eight times. First cut
it out and make its shards; the validation text may be longer:

    head -c 1100000 TinyStories.txt > small.txt
    python tinystories.py pretokenize --data_dir=small --source=small.txt --valid_source=valid.txt
    python sweep.py experiments/epochs.py --data_dir=small
"""

title = "A short text, read four and eight times"
# the dial's rates for a run of this length
base = (
    "config/speedrun_cpu.py --dim=128 --n_heads=2 --max_seq_len=512 --sliding_window=128 "
    "--batch_size=4 --max_iters=540 --head_lr=0.0075 --embedding_lr=0.08 --bigram_lr=0.013 "
    "--scalar_lr=0.02 --momentum=0.915 --muon_beta1=0.65 --muon_weight_decay=0"
)
runs = (
    "recipe:;"
    "head: --head_lr=0.004;"
    "decay: --muon_weight_decay=0.3;"
    "tables: --bigram_rows=0 --embedding_weight_decay=0.5;"
    "dropout: --dropout=0.1;"
    "all: --head_lr=0.004 --muon_weight_decay=0.3 --bigram_rows=0 --embedding_weight_decay=0.5 "
    "--dropout=0.1;"
    "recipe-8: --max_iters=1080;"
    "all-8: --max_iters=1080 --head_lr=0.004 --muon_weight_decay=0.3 --bigram_rows=0 "
    "--embedding_weight_decay=0.5 --dropout=0.1"
)
evals = 6
eval_windows = 1000  # or all of a shorter validation text
