"""One table for embedding and head, or two: the tiny CS336 model, for a GPU."""

title = "Weight tying and initialization"
base = "config/cs336_tiny.py --optimizer=adamw --base_learning_rate=1e-3 --max_iters=100000"
base += " --warmup_iters=1000 --cooldown_frac=1 --cooldown_shape=cosine --final_lr_frac=0.1"
# sqrt(2 / (10,000 + 512)) = 0.0138
runs = """
untied: --tie_embeddings=False --embedding_std=1 --head_std=0.0138
tied, std 1: --tie_embeddings=True --embedding_std=1
tied, std 0.0138: --tie_embeddings=True --embedding_std=0.0138
"""
seeds = 1
evals = 50
eval_windows = 3200
