"""
Which vocabulary is best after a minute and a half on one core? Measured in bits per byte, since
losses per token cannot be compared between vocabularies.
"""

title = "Vocabulary at equal time"
base = "experiments/modded.py"
grid = "vocab_size=512,1024,2048,4096,8192"
equal_minutes = 1.5
evals = 2
eval_windows = 2000  # all of the validation text, in any vocabulary
