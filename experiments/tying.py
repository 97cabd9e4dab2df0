"""
One table for embedding and head, or two; and how large a shared one begins: as an embedding, with a
standard deviation of 1, or as a head, with sqrt(2 / (1024 + 128)), Glorot's.
"""

title = "Weight tying and how it begins"
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
