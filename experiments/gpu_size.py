"""
The four CS336 sizes, d_model 512 to 1,280, at 100,000 steps each with the rates and batch sizes of
LLM-from-scratch's table, for a GPU. For a comparison at equal time, use equal_minutes instead.
"""

title = "Model size"
base = "--optimizer=adamw --max_iters=100000"
base += " --warmup_iters=1000 --cooldown_frac=1 --cooldown_shape=cosine --final_lr_frac=0.1"
runs = """
tiny: config/cs336_tiny.py --base_learning_rate=1e-3 --batch_size=64
small: config/cs336_small.py --base_learning_rate=1e-3 --batch_size=64
medium: config/cs336_medium.py --base_learning_rate=3e-4 --batch_size=32
large: config/cs336_large.py --base_learning_rate=2e-4 --batch_size=8
"""
seeds = 1
evals = 50
eval_windows = 3200
