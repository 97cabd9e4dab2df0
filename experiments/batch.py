"""Batch sizes at equal tokens, so larger batches take fewer steps; each at three rates."""

title = "Batch size at equal tokens"
base = "experiments/plain.py --warmup_iters=10"
grid = "batch_size=2,8,32 base_learning_rate=1e-3,3e-3,1e-2"
equal_tokens = 400_000
evals = 4
eval_windows = 384  # a multiple of every batch size, so that all are evaluated on the same text
