"""AdamW's learning rate, from far too small to far too large."""

title = "Learning rate of AdamW"
base = "experiments/plain.py"
grid = "base_learning_rate=3e-4,1e-3,3e-3,1e-2,3e-2,1e-1,1,10"
equal_tokens = 400_000
evals = 4
eval_windows = 400
