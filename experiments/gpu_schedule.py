"""10,000 or 50,000 steps of 256 sequences: the tiny CS336 model on TinyStories, for a GPU."""

title = "Length of the schedule"
base = "config/cs336_tiny.py --optimizer=adamw --base_learning_rate=1e-3 --batch_size=256"
base += " --warmup_iters=500 --cooldown_frac=1 --cooldown_shape=cosine --final_lr_frac=0.1"
grid = "max_iters=10000,50000"
seeds = 1
evals = 50
eval_windows = 2560
