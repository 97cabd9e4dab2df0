"""Learning rates at 10,000 steps: the tiny CS336 model on TinyStories, for a GPU."""

title = "Learning rate, 10,000 steps"
base = "config/cs336_tiny.py --optimizer=adamw --batch_size=128 --max_iters=10000"
base += " --warmup_iters=500 --cooldown_frac=1 --cooldown_shape=cosine --final_lr_frac=0.1"
grid = "base_learning_rate=2e-4,5e-4,1e-3,1e-2"
evals = 50
eval_windows = 2560
