"""How long the schedule is: the rate falls over 100 steps, or 200, 400, 800."""

title = "Length of the schedule"
base = "experiments/plain.py"
grid = "max_iters=100,200,400,800"
evals = 8
eval_windows = 400
