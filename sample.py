"""
Generate stories with a trained model, in PyTorch.

    python sample.py --out_dir=out --start="Once upon a time" --num_samples=3
    python sample.py --checkpoint=out/ckpt.pt --temperature=0
    python sample.py --checkpoint=hf:user/name            # a Llama of the Hugging Face hub
"""

import os
import sys

from configurator import configure, printable
from system.tuning import tune_process

# -----------------------------------------------------------------------------
out_dir = "out"  # folder of a training run
checkpoint = ""  # any model that export.py reads; empty: best.pt in out_dir, or ckpt.pt
tokenizer = ""  # a tokenizer model elsewhere; empty: tokenizer.model beside the checkpoint
start = ""  # prompt, or FILE:prompt.txt for a text in a file
num_samples = 1  # number of stories
max_new_tokens = 256  # at most, in each story
temperature = 1.0  # 0: always the likeliest token
top_k = 0  # sample from this many likeliest tokens; 0: all
top_p = 0.9  # sample from the likeliest tokens with this total probability; 1: all
seed = 1337  # the same seed gives the same stories
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the first there is of cuda, mps, cpu
dtype = "float32"  # auto, float32, bfloat16, float16
configure(globals())
# -----------------------------------------------------------------------------

tune_process()

import torch

from formats.table import load_teller
from report.stories import check_sampling, read_prompt
from system.hardware import pick_device, pick_dtype
from system.threads import Threads

check_sampling(globals(), num_samples=1, max_new_tokens=0, top_k=0)
start = read_prompt(start)

if not checkpoint:
    best, latest = (os.path.join(out_dir, name) for name in ("best.pt", "ckpt.pt"))
    checkpoint = best if os.path.exists(best) else latest
device = pick_device(device)
threads = Threads(device)
dtype = pick_dtype(dtype, device)
(model, tokenizer, _), prompt = load_teller(checkpoint, start, tokenizer)
model = model.to(device).eval()
model.dtype = dtype

stop = tokenizer.stop
generator = torch.Generator().manual_seed(seed)
on_terminal = sys.stdout.isatty()
for i in range(num_samples):
    if i:
        print("\n---\n")
    new = model.generate(prompt, max_new_tokens, temperature, top_k, top_p, stop, generator)
    text = tokenizer.decode([*prompt, *threads.watched(new)])
    print(printable(text) if on_terminal else text)
