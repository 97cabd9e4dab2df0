"""128 or 256 sequences per step: the tiny CS336 model on TinyStories, for a GPU."""

title = "Batch size at equal steps"
base = "config/cs336_tiny.py --optimizer=adamw --base_learning_rate=1e-3 --max_iters=10000"
base += " --warmup_iters=500 --cooldown_frac=1 --cooldown_shape=cosine --final_lr_frac=0.1"
grid = "batch_size=128,256"
evals = 50
eval_windows = 2560
