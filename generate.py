"""
Generate many stories with one or more models, measure them, and show them side by side on a page.

    python generate.py                                     # out/best.pt -> out/stories.html
    python generate.py out_a out_b/ckpt.pt --num_samples=20 --start="Once upon a time"
    python generate.py out/model.bin --source=my_text.txt  # look for text copied from this file

A model is the folder of a run, or anything that export.py reads. The metrics are how varied the
stories are, how much of them is copied from the training text, and whether they end properly; the
page explains each one. Real stories from the validation text are measured too, for comparison.
"""

import itertools
import os
import time

from configurator import UserError, configure, listed_paths, settings_of
from system.tuning import tune_process

# -----------------------------------------------------------------------------
# models
models = "out"  # run folders or model files, separated by spaces or commas
tokenizer = ""  # tokenizer model for all of them; empty: the one beside each
# stories
start = ""  # prompt; FILE:prompt.txt reads it from a file
num_samples = 100  # stories per model
max_new_tokens = 256  # maximum tokens per story, after the prompt
orders = False  # tell each story for an order from the validation text, and score it
order_bias = 3.0  # added to the logits of what is ordered until the story has it; 0: off
batch_size = 50  # stories generated at once
# sampling
temperature = 1.0  # 0: always the most likely token
top_k = 0  # sample from the k most likely tokens; 0: all
top_p = 0.9  # sample from the most likely tokens up to this probability; 1: all
seed = 1337  # the same seed gives the same stories
# copies of the training text
source = ""  # training text, a file or folder; empty: the run's token shards
ngram = 8  # a copy has at least this many words in a row
# real stories for comparison
reference = True  # also measure stories from the validation text
valid_source = ""  # validation text; empty: the first run's validation shard
# output
out = ""  # HTML page; empty: stories.html in the first run's folder
json = ""  # .jsonl file for the metrics, one line per model; empty: none
# hardware
device = "auto"  # cpu, cuda, cuda:1, mps, or auto (first of cuda, mps, cpu)
dtype = "float32"  # float32, bfloat16, float16, or auto (a fast one)
configure(globals(), positional="models", many=True)
# -----------------------------------------------------------------------------

tune_process()

import torch

from dataset import DataPaths, TokenData
from formats.table import HUB, encode_prompt, load_for_sampling, model_in, recognize
from report.stories import (
    Overlap,
    Story,
    check_sampling,
    documents_of_file,
    documents_of_shard,
    metrics_of,
    orders_of_shard,
    pieces_of,
    read_prompt,
    rows_of,
    sample_items,
    write_lines,
)
from report.storypage import write_page
from report.tables import print_table
from system.hardware import pick_device, pick_dtype
from system.progress import print_line, progress
from system.threads import Threads
from text.corpus import books_among, text_files
from text.orders import Wanted, is_to_order, parse
from training.checkpoint import RUN_FILE, load_checkpoint
from training.runlog import RunLog

REAL = "real stories"  # the name of their column
MADE_BY = b"Made by generate.py"  # in the footer of a page
settings = settings_of(globals())
check_sampling(settings, num_samples=1, max_new_tokens=1, top_k=0, batch_size=1, ngram=1)
start = read_prompt(start)


def check_target(name, path, endings):
    """Raise UserError, before any work is done, unless a file can be written to the path."""
    if os.path.splitext(path)[1] not in endings:
        raise UserError(f"{name} = {path}: expected a path ending in {' or '.join(endings)}")
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):  # missing folders will be created
        folder = os.path.dirname(folder)
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would block
        raise UserError(f"cannot write {path}: it is not a file; choose another --{name}=PATH")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(
            f"cannot write {path}: {folder} is not a writable folder; choose another --{name}=PATH"
        )
    if os.path.exists(path):  # logs and corpora end in .jsonl too
        with open(path, "rb") as f:
            content = f.read()
        if MADE_BY not in content if name == "out" else not content.startswith(b'{"model": '):
            raise UserError(
                f"{path} already exists and was not written by generate.py; choose another "
                f"--{name}=PATH"
            )


def bits_per_byte_of(path, facts):
    """Return a model's validation bits per byte, from its checkpoint or the log, or None."""
    if "validation" in facts:  # "0.7 bits per byte"
        return float(facts["validation"].split()[0])
    if not path.endswith("model.bin"):
        return None
    return RunLog(os.path.dirname(path)).read().best.get("val_bpb")


def data_of(path, tokenizer):
    """
    Return (folder, TokenData) of the shards that a model was trained on. Raises UserError if they
    no longer exist or are not recorded.
    """
    if recognize(path) == "checkpoint":
        config = load_checkpoint(path).get("config", {})
    else:  # from the log beside model.bin
        config = RunLog(os.path.dirname(path)).read().start.get("config", {})
    names = ("data_dir", "vocab_source", "vocab_size")
    if any(name not in config for name in names):
        raise UserError("its training data is not recorded")
    paths = DataPaths(*(config[name] for name in names))
    if not os.path.isdir(paths.shards):
        raise UserError(f"its token shards {paths.shards} do not exist")
    return paths.shards, TokenData(paths, 1, tokenizer, check=False)


def generate_stories(name, model, tokenizer, jobs):
    """
    Return the Story objects of a model, and print the speed. jobs: for each story, the ids of its
    prompt, and its Order or None. Stories with equally long prompts are generated together.
    """
    model.dtype = compute_dtype
    generator = torch.Generator().manual_seed(seed)
    stories, started = [None] * len(jobs), time.perf_counter()
    bar, n_done = progress(total=len(jobs), unit=" stories", desc=name), 0
    for batch in batches_of([len(prompt) for prompt, _ in jobs]):
        prompts = [jobs[i][0] for i in batch]
        limit = min(max_new_tokens, model.room_after(prompts[0]))
        draws = torch.rand(len(batch), limit, generator=generator, dtype=torch.float64)
        ids_of, ended = [[] for _ in batch], set()
        sampling = temperature, top_k, top_p, tokenizer.stop
        wanted = None
        if orders:
            wanted = [Wanted(jobs[i][1], tokenizer, order_bias, jobs[i][0]) for i in batch]
        for step in threads.watched(model.generate_batch(prompts, draws, *sampling, wanted)):
            for k, token in enumerate(step):
                if token is None:
                    ended.add(k)
                else:
                    ids_of[k].append(token)
            bar.update(n_done + len(ended) - bar.n)
        for k, (i, ids) in enumerate(zip(batch, ids_of, strict=True)):
            prompt, order = jobs[i]
            text, prompt_text = tokenizer.decode([*prompt, *ids]), tokenizer.decode(prompt)
            if is_to_order(order, start, model.args.orders):
                text, prompt_text = parse(text)[1], start.lstrip(" ")
            stories[i] = Story(text, len(ids), k in ended, prompt_text, order)
        n_done += len(batch)
        bar.update(n_done - bar.n)
    bar.close()
    seconds, n_tokens = time.perf_counter() - started, sum(story.n_tokens for story in stories)
    print_line(
        f"{name}: {len(stories):,} stories, {n_tokens:,} tokens in {seconds:.1f} s, "
        f"{n_tokens / seconds:,.0f} tokens/s"
    )
    return stories


def batches_of(lengths):
    """Yield lists of at most batch_size indices of equal lengths."""
    indices = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, group in itertools.groupby(indices, key=lengths.__getitem__):
        group = list(group)
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


def jobs_of(name):
    """Return the jobs of generate_stories() for a model."""
    if orders:
        return [(encode_prompt(loaded[name], paths[name], start, order), order) for order in todo]
    return [(prompts[name], None)] * num_samples


def real_story(text, tokenizer, order=None):
    """Return a Story from the validation text, cut at max_new_tokens as a model's would be."""
    ids = tokenizer.encode(text, bos=False)
    if len(ids) <= max_new_tokens:
        return Story(text, len(ids), order=order)
    return Story(tokenizer.decode(ids[:max_new_tokens]), max_new_tokens, False, order=order)


names = listed_paths(models)
if not names:
    raise UserError(f"models = {models!r}: expected run folders or model files")
if len(set(names)) < len(names):
    raise UserError(f"models = {models}: expected each model only once")
paths = {name: model_in(name) for name in names}
if not out:
    is_folder = os.path.isdir(names[0]) and not os.path.exists(os.path.join(names[0], RUN_FILE))
    folder = names[0] if is_folder else os.path.dirname(names[0])
    out = os.path.join("" if names[0].startswith(HUB) else folder, "stories.html")
check_target("out", out, (".html", ".htm"))
if json:
    check_target("json", json, (".jsonl",))
source_files = text_files(source) if source else []
valid_files = text_files(valid_source) if valid_source else []

torch_device = pick_device(device)
threads = Threads(torch_device)
compute_dtype = pick_dtype(dtype, torch_device)
loaded, prompts = {}, {}
for name, path in paths.items():
    loaded[name], prompts[name] = load_for_sampling(path, start, tokenizer)

# what the stories are compared with; without its shards or --source, a model has no overlap
data, notes = {}, []
for name in names if orders or not source or (reference and not valid_source) else []:
    try:
        data[name] = data_of(paths[name], loaded[name][1])
    except UserError as e:
        if orders:
            raise UserError(f"orders come from the validation shard of {name}, but {e}") from None
        if not source:
            notes.append(f"{name} is not checked for copies: {e}; use --source=PATH.")

real, todo = [], []  # Story, Order
if orders:
    name, (_, tokens) = next(iter(data.items()))
    if not tokens.mark:
        raise UserError(
            f"{name} was trained without orders: train with shards of pretokenize --orders"
        )
    marked = orders_of_shard(tokens.valid[0], loaded[name][1], tokens.mark)
    chosen = sample_items(marked, num_samples, seed)
    todo = [order for order, _ in chosen]
    real = [real_story(text, loaded[name][1], order) for order, text in chosen] if reference else []
elif reference and valid_source:
    books = books_among(valid_files)
    documents = (documents_of_file(path, path in books) for path in valid_files)
    documents = itertools.chain.from_iterable(documents)
    chosen = sample_items(documents, num_samples, seed)
    real = [real_story(text, loaded[names[0]][1]) for text, _ in chosen]
elif reference and data:
    name, (_, tokens) = next(iter(data.items()))
    documents = documents_of_shard(tokens.valid[0], loaded[name][1], tokens.mark)
    chosen = sample_items(documents, num_samples, seed)
    real = [real_story(text, loaded[name][1]) for text, _ in chosen]
if reference and not real:
    notes.append("No real stories to compare with: use --valid_source=PATH.")

stories = {  # name: list of Story
    name: generate_stories(name, model.to(torch_device).eval(), its_tokenizer, jobs_of(name))
    for name, (model, its_tokenizer, _) in loaded.items()
}
if real:
    stories[REAL] = real

# one pass over each training text, for all columns that are compared with it
text_paths = {name: source or data[name][0] for name in names if source or name in data}
if REAL in stories and text_paths:
    text_paths[REAL] = next(iter(text_paths.values()))
overlaps = dict.fromkeys(stories)
for text_path in dict.fromkeys(text_paths.values()):
    compared = [name for name, path in text_paths.items() if path == text_path]
    overlap = Overlap([story for name in compared for story in stories[name]], ngram)
    if source:
        sizes, unit = map(os.path.getsize, source_files), "B"
        documents = map(documents_of_file, source_files)
    else:
        shards, unit = data[compared[0]][1].train, " tokens"
        sizes, its_tokenizer = map(len, shards), loaded[compared[0]][1]
        mark = data[compared[0]][1].mark
        documents = (documents_of_shard(shard, its_tokenizer, mark) for shard in shards)
    started = time.perf_counter()
    with progress(total=sum(sizes), unit=unit, unit_scale=True, desc="training text") as bar:
        for text, amount in pieces_of(itertools.chain.from_iterable(documents)):
            overlap.feed(text)
            bar.update(amount)
    seconds = time.perf_counter() - started
    print(f"training text: {overlap.n_words:,} words, {overlap.n_words / seconds:,.0f} words/s")
    if not overlap.n_words:
        raise UserError(f"{text_path} contains no text: choose another --source=PATH")
    owners = f" of {', '.join(compared)}" if len(set(text_paths.values())) > 1 else ""
    notes.append(f"The training text{owners}, {text_path}, has {overlap.n_words:,} words.")
    overlaps |= dict.fromkeys(compared, overlap)

totals = {name: sum(story.n_words() for story in column) for name, column in stories.items()}
n_words = min((n for n in totals.values() if n), default=0)
notes += [f"{name} generated no words." for name, n in totals.items() if not n]
columns = {name: metrics_of(column, overlaps[name], n_words) for name, column in stories.items()}
for name, (_, _, facts) in loaded.items():
    columns[name]["bits_per_byte"] = bits_per_byte_of(paths[name], facts)

title = f"Stories by {' and '.join(names)}"
write_page(out, title, stories, overlaps, columns, ngram, n_words, notes, settings)
if json:
    write_lines(json, columns, settings)
print()
print_table(["", *columns], [row[:-1] for row in rows_of(columns, ngram, n_words)])
print_line("\n".join(["", *notes]))
print_line(f"wrote {out}, which explains the metrics")
