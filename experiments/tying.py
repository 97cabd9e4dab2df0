"""
One table for embedding and head, or two. A shared table is initialized like an embedding (std 1),
like a head (Glorot's std, sqrt(2 / (1024 + 128)) = 0.042), or with GPT-2's std of 0.02.
"""

title = "Weight tying and initialization"
base = "experiments/plain.py"
runs = """
untied: --tie_embeddings=False --embedding_std=1 --head_std=0.0417
tied, std 1: --embedding_std=1
tied, std 0.042: --embedding_std=0.0417
tied, std 0.02: --embedding_std=0.02
"""
equal_tokens = 400_000
evals = 8
eval_windows = 400
