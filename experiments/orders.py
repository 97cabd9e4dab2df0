"""
What do stories to order cost in bits per byte, and what teaches a model to obey? All runs have the
tokens of ten minutes on two cores. First make shards of the same text, with the same vocabulary,
in two folders; afterwards score the stories:

    python tinystories.py pretokenize --data_dir=data/plain --source=my_text.txt
    python tinystories.py pretokenize --data_dir=data/orders --source=my_text.txt --orders
    python sweep.py experiments/orders.py
    python generate.py out/sweeps/orders/orders-* --orders --temperature=0.7
"""

title = "Stories to order"
base = "config/speedrun_cpu.py"
runs = """
plain: --data_dir=data/plain
orders: --data_dir=data/orders
orders-weight-1: --data_dir=data/orders --order_weight=1
orders-weight-8: --data_dir=data/orders --order_weight=8
orders-joined-documents: --data_dir=data/orders --separate_documents=False
orders-stories-only: --data_dir=data/orders --learn_orders=False
"""
equal_tokens = 9_100_000
evals = 2
eval_windows = 2000  # or all of a shorter validation text
