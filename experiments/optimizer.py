"""AdamW and Muon on the same plain Llama, each at several learning rates."""

title = "AdamW against Muon"
base = "experiments/plain.py"
runs = """
AdamW 1e-3: --base_learning_rate=1e-3
AdamW 3e-3: --base_learning_rate=3e-3
AdamW 1e-2: --base_learning_rate=1e-2
Muon 0.007: --optimizer=muon --hidden_lr=0.007
Muon 0.02: --optimizer=muon --hidden_lr=0.02
Muon 0.06: --optimizer=muon --hidden_lr=0.06
"""
equal_tokens = 400_000
evals = 8
eval_windows = 400
