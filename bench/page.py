"""
Measure pages of export.py --format=html: tokens/s, time until ready and memory, in every browser
that is installed and in Node, compared with ./run on one thread.

    python -m bench.page                          # models of random weights; needs `make run`
    python -m bench.page --checkpoint=out/story   # a model of yours
"""

import os
import re
import shutil
import statistics
import time

from bench.common import alternate, open_device, output_of
from bench.random_models import MODELS, fake_tokenizer, random_transformer
from configurator import UserError, check_range, configure
from formats.modelbin import export_model
from formats.table import load, model_in
from formats.webpage import DTYPES, write_page
from report.tables import print_table
from system.browser import Chromium, Firefox
from system.wasm import ENGINE, LIB

# -----------------------------------------------------------------------------
engine = "run"  # our engine, built by make run
checkpoint = ""  # measure this model; empty: models of random weights
dtype = ""  # number format; empty: the usual one of each model
stories = 15  # stories each program tells before the next one does
page_rounds = 3  # rounds, in which the programs alternate
length = 256  # tokens of a story
folder = "out/random"  # folder for the pages and random models
configure(globals())
# -----------------------------------------------------------------------------

ROWS = (("260K", "fp32"), ("15M", "int8"), ("110M", "int8"))
TELL_IN_NODE = """
    import { readFileSync } from "node:fs";
    const [module, wasm, model, tokenizer, stories, length] = process.argv.slice(1);
    const { load } = await import(module);
    const bytes = [wasm, model, tokenizer].map((path) => readFileSync(path));
    const empty = process.memoryUsage().rss, start = performance.now();
    const llama = await load(...bytes);
    console.log(`ready ${performance.now() - start}`);
    for (let seed = 0; seed < stories; seed++) {
      const start = performance.now();
      let n = 0;
      for (const {} of llama.tell("", { seed, temperature: 0.8, length: Number(length) })) n++;
      console.log(`speed ${n / (performance.now() - start) * 1000}`);
    }
    console.log(`memory ${process.memoryUsage().rss - empty}`);
"""
STATUS = "document.querySelector('.status')?.textContent ?? ''"


def told_by_run(files):
    """Return {measure: figures} of ./run on one thread."""
    speeds = []
    for seed in range(stories):
        flags = f"-j 1 -t 0.8 -s {seed} -n {length}".split()
        text = output_of([os.path.abspath(engine), files["model"], "-z", files["tok"], *flags])
        speeds.append(float(re.search(r"achieved tok/s: ([0-9.]+)", text)[1]))
    return {"speed": speeds}


def told_by_node(files):
    paths = os.path.join(LIB, "llama2.mjs"), ENGINE, files["model"], files["tok"]
    command = ["node", "--input-type=module", "-e", TELL_IN_NODE, *paths, str(stories), str(length)]
    figures = {"speed": [], "ready": [], "memory": []}
    for line in output_of(command).splitlines():
        name, value = line.split()
        figures[name].append(float(value))
    return figures


def told_by_browser(browser_class, files):
    with browser_class() as browser:
        browser.open("about:blank")
        time.sleep(2)
        empty = browser.memory()
        browser.open("file://" + os.path.abspath(files["page"]))
        ready = browser.wait_until(f"/Ready in ([0-9.]+)/.exec({STATUS})?.[1]")
        for name, value in {"prompt": "", "length": length}.items():
            browser.evaluate(f"document.getElementById('{name}').value = {value!r}")
        speeds = []
        for seed in range(stories):
            browser.evaluate(f"document.getElementById('seed').value = {seed}")
            browser.evaluate("document.getElementById('tell').click()")
            told = f"/ tokens(?:, ([0-9,]+) tokens per second)?\\.$/.exec({STATUS})"
            told = browser.wait_until(f"((match) => match && (match[1] || '0'))({told})")
            speeds.append(float(told.replace(",", "")))
        speeds = [speed for speed in speeds if speed]  # 0: too short a time for a browser's clock
        if not speeds:
            raise UserError("the stories are too short to be measured: use another model")
        return {"speed": speeds, "ready": [1000 * float(ready)],
                "memory": [browser.memory() - empty]}  # fmt: skip


def write_files(name, number_format):
    """Write page, model.bin and tokenizer.bin of a row; return their paths."""
    if name in MODELS:
        model, facts = random_transformer(name), {}
        tokenizer = fake_tokenizer(model.args.vocab_size)
    else:
        model, tokenizer, facts = load(model_in(name))
    stem = re.sub(r"\W+", "_", f"page_{name}_{number_format}").strip("_")
    kinds = {"page": ".html", "model": ".bin", "tok": ".tokenizer.bin"}
    files = {kind: os.path.join(folder, stem + ending) for kind, ending in kinds.items()}
    write_page(model, files["page"], number_format, tokenizer,
               {"title": name, "language": "en", **facts})  # fmt: skip
    export_model(model, files["model"], None, number_format, tokenizer.fingerprint)
    tokenizer.export(files["tok"])
    return files


def measure(name, number_format):
    """Measure one model; print its table."""
    files = write_files(name, number_format)
    programs = {"./run -j 1": lambda: told_by_run(files)}
    if shutil.which("node"):
        programs["Node"] = lambda: told_by_node(files)
    for browser_class in (Chromium, Firefox):
        if browser_class.path():
            programs[browser_class.__name__] = lambda b=browser_class: told_by_browser(b, files)
    rows = []
    for program, rounds in alternate(programs, page_rounds).items():
        columns = (
            [speed for figures in rounds for speed in figures["speed"][stories // 3 :]],
            [figures["speed"][0] for figures in rounds],
            [ms for figures in rounds for ms in figures.get("ready", [])],
            [n / 1e6 for figures in rounds for n in figures.get("memory", [])],
        )
        rows.append([program, *(f"{statistics.median(x):,.0f}" if x else "" for x in columns)])
    print(f"\n{name} in {number_format}")
    print_table(["program", "tokens/s", "first story", "ready, ms", "memory, MB"], rows)
    print(flush=True)


if not os.path.exists(engine):
    raise UserError(f"engine = {engine!r} does not exist; run: make run")
if dtype and dtype not in DTYPES:
    raise UserError(f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)}")
check_range(1, stories=stories, page_rounds=page_rounds)
check_range(2, length=length)
os.makedirs(folder, exist_ok=True)
open_device()
print(f"tokens/s of whole stories: the median without the first third of {stories} in each of")
print(f"{page_rounds} rounds, in which the programs alternate. Ready: after the page has loaded.")
for name, usual in [(checkpoint, "int8")] if checkpoint else ROWS:
    measure(name, dtype or usual)
