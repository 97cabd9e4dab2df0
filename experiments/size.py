"""Which model size is best after two minutes on one core?"""

title = "Model size at equal time"
base = "experiments/modded.py"
runs = """
32 x 2: --dim=32 --n_layers=2 --n_heads=2
64 x 3: --dim=64 --n_layers=3 --n_heads=2
128 x 4: --dim=128 --n_layers=4 --n_heads=4
192 x 5: --dim=192 --n_layers=5 --n_heads=6
256 x 6: --dim=256 --n_layers=6 --n_heads=4
"""
equal_minutes = 2.0
evals = 3
eval_windows = 400
