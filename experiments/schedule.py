"""Length of the schedule: the learning rate falls over 100, 200, 400 or 800 steps."""

title = "Length of the schedule"
base = "experiments/plain.py"
grid = "max_iters=100,200,400,800"
evals = 8
eval_windows = 400
