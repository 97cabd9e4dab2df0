"""
Many stories by one or more models: figures of them, and a page with the stories side by side.

    python generate.py                                     # of out/best.pt; into out/stories.html
    python generate.py out_a out_b/ckpt.pt --num_samples=20 --start="Once upon a time"
    python generate.py out/model.bin --source=my_text.txt  # where copies are looked for

A model is the folder of a run, or anything that export.py reads. The figures are how varied the
stories are, how much of them is copied from the training text, and whether they end; what each one
means stands beside it on the page. Real stories of the validation text are measured with them.
"""

import itertools
import os
import time

from configurator import UserError, configure, listed_paths, settings_of
from system.tuning import tune_process

# -----------------------------------------------------------------------------
models = "out"  # folders of runs, or anything that export.py reads, also with commas
tokenizer = ""  # a tokenizer model elsewhere, for all of them; empty: those beside the models
start = ""  # prompt, or FILE:prompt.txt for a text in a file
num_samples = 100  # stories of each
max_new_tokens = 256  # at most, in each
temperature = 1.0  # 0: always the likeliest token
top_k = 0  # draw among this many likeliest; 0: all
top_p = 0.9  # draw among the likeliest with this probability; 1: all
seed = 1337  # the same seed tells the same stories
batch_size = 50  # stories that are told at once
source = ""  # training text: .txt, .json, .jsonl or a folder; empty: the shards of the run
ngram = 8  # words in a row that count as copied where the training text has them too
reference = True  # measure real stories of the validation text as well
valid_source = ""  # text that those are from; empty: the validation shard of the first run
out = ""  # the page; empty: stories.html in the first run's folder
json = ""  # a .jsonl for the figures, one line a model; empty: none
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the first there is of cuda, mps, cpu
dtype = "float32"  # auto, float32, bfloat16, float16
configure(globals(), positional="models", many=True)
# -----------------------------------------------------------------------------

tune_process()

import torch

from dataset import DataPaths, TokenData
from formats.table import HUB, load_teller, recognize
from report.stories import (
    Overlap,
    Story,
    check_sampling,
    documents_of_file,
    documents_of_shard,
    figures_of,
    pieces_of,
    read_prompt,
    rows_of,
    some_of,
    write_lines,
)
from report.storypage import write_page
from report.tables import print_table
from system.hardware import pick_device, pick_dtype
from system.progress import print_line, progress
from system.threads import Threads
from text.corpus import books_among, text_files
from training.checkpoint import RUN_FILE, load_checkpoint
from training.runlog import RunLog

REAL = "real stories"  # the name of their column
MADE_BY = b"Made by generate.py"  # in the footer of a page
settings = settings_of(globals())
check_sampling(settings, num_samples=1, max_new_tokens=1, top_k=0, batch_size=1, ngram=1)
start = read_prompt(start)


def model_in(path):
    """The model of a run's folder, as sample.py takes it; any other path stays what it is."""
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, RUN_FILE)):
        return path
    found = [os.path.join(path, name) for name in ("best.pt", "ckpt.pt", "model.bin")]
    if not any(map(os.path.exists, found)) and not os.path.exists(f"{path}/config.json"):
        raise UserError(f"there is no model in {path}: expected best.pt, ckpt.pt or model.bin")
    return next(filter(os.path.exists, found), path)


def check_target(name, path, endings):
    """Raise UserError, before any work is done, unless a file can be written to the path."""
    if os.path.splitext(path)[1] not in endings:
        raise UserError(f"{name} = {path}: expected a file ending in {' or '.join(endings)}")
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):  # those that are missing will be made
        folder = os.path.dirname(folder)
    is_odd = os.path.exists(path) and not os.path.isfile(path)  # a pipe would be waited for
    if is_odd or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: give another place with --{name}=PATH")
    if os.path.exists(path):  # a log and a corpus end in .jsonl too
        with open(path, "rb") as f:
            content = f.read()
        if MADE_BY not in content if name == "out" else not content.startswith(b'{"model": '):
            raise UserError(f"{path} exists, and is not by generate.py: name another file")


def bits_per_byte_of(path, facts):
    """What a model reached in validation, from its checkpoint or the log beside it, or None."""
    if "validation" in facts:  # "0.7 bits per byte"
        return float(facts["validation"].split()[0])
    if not path.endswith("model.bin"):
        return None
    return RunLog(os.path.dirname(path)).read().best.get("val_bpb")


def data_of(path, tokenizer):
    """
    (folder, TokenData) of the shards that a model was trained on. Raises UserError if they do not
    exist any more, or if nothing says which they were.
    """
    if recognize(path) == "checkpoint":
        config = load_checkpoint(path).get("config", {})
    else:  # the log beside a model.bin
        config = RunLog(os.path.dirname(path)).read().start.get("config", {})
    names = ("data_dir", "vocab_source", "vocab_size")
    if any(name not in config for name in names):
        raise UserError("it does not say what it was trained on")
    paths = DataPaths(*(config[name] for name in names))
    if not os.path.isdir(paths.shards):
        raise UserError(f"its token shards, {paths.shards}, are not there")
    return paths.shards, TokenData(paths, 1, tokenizer, check=False)


def tell(name, model, tokenizer, prompt):
    """num_samples stories (Story) by a model, from the ids of a prompt; prints the speed."""
    model.dtype = compute_dtype
    generator = torch.Generator().manual_seed(seed)
    limit = min(max_new_tokens, model.room_after(prompt))
    prompt_text, stories, started = tokenizer.decode(prompt), [], time.perf_counter()
    bar = progress(total=num_samples, unit=" stories", desc=name)
    for first in range(0, num_samples, batch_size):
        n = min(batch_size, num_samples - first)
        draws = torch.rand(n, limit, generator=generator, dtype=torch.float64)
        new, ended = [[] for _ in range(n)], set()
        words = temperature, top_k, top_p, tokenizer.stop
        for step in threads.watched(model.generate_batch(prompt, draws, *words)):
            for i, token in enumerate(step):
                if token is None:
                    ended.add(i)
                else:
                    new[i].append(token)
            bar.update(first + len(ended) - bar.n)
        bar.update(first + n - bar.n)
        stories += [
            Story(tokenizer.decode([*prompt, *ids]), len(ids), i in ended, prompt_text)
            for i, ids in enumerate(new)
        ]
    bar.close()
    took, n_tokens = time.perf_counter() - started, sum(story.n_tokens for story in stories)
    print_line(
        f"{name}: {num_samples:,} stories, {n_tokens:,} tokens in {took:.1f} s, "
        f"{n_tokens / took:,.0f} tokens/s"
    )
    return stories


def real_story(text, tokenizer):
    """A Story from the validation text, cut where one by a model would have been."""
    ids = tokenizer.encode(text, bos=False)
    if len(ids) <= max_new_tokens:
        return Story(text, len(ids))
    return Story(tokenizer.decode(ids[:max_new_tokens]), max_new_tokens, ended=False)


names = listed_paths(models)
if not names:
    raise UserError("models is empty: expected folders of runs or files, with commas between them")
if len(set(names)) < len(names):
    raise UserError(f"models = {models}: one of them is named twice")
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
    loaded[name], prompts[name] = load_teller(path, start, tokenizer)

# what the stories are compared with; a run whose shards are gone has no overlap
data, notes = {}, []
for name in names if not source or (reference and not valid_source) else []:
    try:
        data[name] = data_of(paths[name], loaded[name][1])
    except UserError as e:
        if not source:
            notes.append(f"For {name} copies are not looked for: {e}; --source= names a text.")

real = []  # Story
if reference and valid_source:
    books = books_among(valid_files)
    documents = (documents_of_file(path, path in books) for path in valid_files)
    documents = itertools.chain.from_iterable(documents)
    real = [real_story(t, loaded[names[0]][1]) for t, _ in some_of(documents, num_samples, seed)]
elif reference and data:
    name, (_, tokens) = next(iter(data.items()))
    documents = documents_of_shard(tokens.valid[0], loaded[name][1])
    real = [real_story(t, loaded[name][1]) for t, _ in some_of(documents, num_samples, seed)]
if reference and not real:
    notes.append("There are no real stories to compare with: --valid_source= names a text.")

told = {  # name: list of Story
    name: tell(name, model.to(torch_device).eval(), loaded_tokenizer, prompts[name])
    for name, (model, loaded_tokenizer, _) in loaded.items()
}
if real:
    told[REAL] = real

# one pass over each training text, for all that are compared with it
texts = {name: source or data[name][0] for name in names if source or name in data}
if REAL in told and texts:
    texts[REAL] = next(iter(texts.values()))
overlaps = dict.fromkeys(told)
for where in dict.fromkeys(texts.values()):
    compared = [name for name, text in texts.items() if text == where]
    overlap = Overlap([story for name in compared for story in told[name]], ngram)
    if source:
        sizes, unit = map(os.path.getsize, source_files), "B"
        documents = map(documents_of_file, source_files)
    else:
        shards, unit = data[compared[0]][1].train, " tokens"
        sizes, of = map(len, shards), loaded[compared[0]][1]
        documents = (documents_of_shard(shard, of) for shard in shards)
    began = time.perf_counter()
    with progress(total=sum(sizes), unit=unit, unit_scale=True, desc="training text") as bar:
        for text, amount in pieces_of(itertools.chain.from_iterable(documents)):
            overlap.feed(text)
            bar.update(amount)
    took = time.perf_counter() - began
    print(f"training text: {overlap.n_words:,} words, {overlap.n_words / took:,.0f} words/s")
    whose = f" of {', '.join(compared)}" if len(set(texts.values())) > 1 else ""
    notes.append(f"The training text{whose}, {where}, has {overlap.n_words:,} words.")
    overlaps |= dict.fromkeys(compared, overlap)

totals = {name: sum(story.n_words() for story in stories) for name, stories in told.items()}
n_words = min((n for n in totals.values() if n), default=0)
notes += [f"{name} told no words." for name, n in totals.items() if not n]
columns = {name: figures_of(stories, overlaps[name], n_words) for name, stories in told.items()}
for name, (_, _, facts) in loaded.items():
    columns[name]["bits_per_byte"] = bits_per_byte_of(paths[name], facts)

title = f"Stories by {' and '.join(names)}"
write_page(out, title, told, overlaps, columns, ngram, n_words, notes, settings)
if json:
    write_lines(json, columns, settings)
print()
print_table(["", *columns], [row[:-1] for row in rows_of(columns, ngram, n_words)])
print_line("\n".join(["", *notes]))
print_line(f"wrote {out}, which says what each figure means")
