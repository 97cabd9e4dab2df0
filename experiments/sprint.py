"""
What did the sprint gain by its rates, its convolutions and smaller steps? It once took 552,960
tokens. "rates" has the same model and the same tokens per step, and 0.85 of the steps; "now" has
0.8 of the tokens. One seed takes four minutes on one core.
"""

title = "The sprint, before and now"
base = "config/sprint_cpu.py --separate_documents=False"  # which came later
runs = (
    "before: --max_iters=270 --batch_size=16 --embedding_conv=0 --key_conv=0 --head_lr=0.012 "
    "--bigram_lr=0.01 --scalar_lr=0.01 --momentum=0.95 --muon_beta1=0.8 --muon_beta2=0.95;"
    "rates: --max_iters=230 --batch_size=16 --embedding_conv=0 --key_conv=0;"
    "now: --max_iters=432"
)
evals = 1
eval_windows = 2000  # or all of a shorter validation text
