"""
Generate stories with a trained model, in PyTorch.

    python sample.py --out_dir=out --start="Once upon a time" --num_samples=3
    python sample.py --checkpoint=out/ckpt.pt --temperature=0
    python sample.py --checkpoint=hf:user/name            # a Llama from the Hugging Face hub
"""

import os
import sys

from configurator import configure, printable
from system.tuning import tune_process

# -----------------------------------------------------------------------------
# model
out_dir = "out"  # folder of a training run
checkpoint = ""  # any model export.py reads; empty: best.pt or ckpt.pt in out_dir
tokenizer = ""  # tokenizer model; empty: tokenizer.model beside the checkpoint
# stories
start = ""  # prompt; FILE:prompt.txt reads it from a file
words = ""  # what the story must contain, for a model trained with orders: kite, forest
features = ""  # the same: Dialogue, Twist, BadEnding, MoralValue, Foreshadowing, Conflict
sentence = ""  # the same: a sentence
summary = ""  # the same: what the story is about
order_bias = 3.0  # added to the logits of what is ordered until the story has it; 0: off
num_samples = 1  # number of stories
max_new_tokens = 256  # maximum tokens per story, after the prompt
# sampling
temperature = 1.0  # 0: always the most likely token
top_k = 0  # sample from the k most likely tokens; 0: all
top_p = 0.9  # sample from the most likely tokens up to this probability; 1: all
seed = 1337  # the same seed gives the same stories
# hardware
device = "auto"  # cpu, cuda, cuda:1, mps, or auto (first of cuda, mps, cpu)
dtype = "float32"  # float32, bfloat16, float16, or auto (a fast one)
configure(globals())
# -----------------------------------------------------------------------------

tune_process()

import torch

from formats.table import load_for_sampling
from report.stories import check_sampling, read_prompt
from system.hardware import pick_device, pick_dtype
from system.threads import Threads
from text.orders import Order, Wanted, is_to_order, parse, split_list

check_sampling(globals(), num_samples=1, max_new_tokens=0, top_k=0)
start = read_prompt(start)

if not checkpoint:
    best, latest = (os.path.join(out_dir, name) for name in ("best.pt", "ckpt.pt"))
    checkpoint = best if os.path.exists(best) else latest
device = pick_device(device)
threads = Threads(device)
dtype = pick_dtype(dtype, device)
order = Order(split_list(words), split_list(features), sentence, summary)
(model, tokenizer, _), prompt = load_for_sampling(checkpoint, start, tokenizer, order)
model = model.to(device).eval()
model.dtype = dtype

stop = tokenizer.stop
generator = torch.Generator().manual_seed(seed)
on_terminal = sys.stdout.isatty()
for i in range(num_samples):
    if i:
        print("\n---\n")
    sampling = temperature, top_k, top_p, stop, generator
    wanted = Wanted(order, tokenizer, order_bias, prompt) if order else None
    tokens = model.generate(prompt, max_new_tokens, *sampling, wanted)
    ids = list(threads.watched(tokens))
    text = tokenizer.decode([*prompt, *ids])
    text = parse(text)[1] if is_to_order(order, start, model.args.orders) else text
    print(printable(text) if on_terminal else text)
    if len(ids) == model.room_after(prompt) < max_new_tokens:
        context = model.args.max_seq_len
        print(f"note: this story stops at the model's context of {context} tokens", file=sys.stderr)
