"""
From a fresh clone to a story, using only the standard library; `make` calls this.

    python system/bootstrap.py story  # environment, engine, corpus, training, a story
    python system/bootstrap.py venv requirements-dev.txt  # only the environment in .venv

A step is skipped if its result exists. .venv is created from the Python that runs this file; if
that Python has the pinned version of torch, .venv uses it instead of downloading another.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

VENV = ".venv"
DATA, OUT = os.path.join("data", "practice"), os.path.join("out", "story")
CONFIG = os.path.join("config", "story.py")
VOCAB_SIZE = 1024
PROMPT, WORDS = "Once upon a time", "kite, brave, forest"
OLDEST_PYTHON = (3, 10)


class StepFailed(Exception):
    """A step failed, so later steps cannot run."""


def call(*command, raw=True, on_line=lambda line: None):
    """
    Run a command; raise StepFailed if it fails. With raw=False its output is indented, without its
    hints about the next step, and each line is also passed to on_line().
    """
    # Ctrl-C also reaches the command, which may have something to save: wait for it
    interrupts = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        pipe = None if raw else subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, text=True) as process:
            for line in process.stdout or ():
                if line.strip() and not line.startswith("next: "):
                    print("   " + line, end="", flush=True)
                on_line(line)
    except OSError as e:
        raise StepFailed(f"cannot run {command[0]}: {e.strerror}") from None
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt
    if process.returncode:
        raise StepFailed(f"{' '.join(command)} ended with status {process.returncode}")


def venv_python():
    folder, name = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return os.path.join(VENV, folder, name)


# ---- the environment


def read(path):
    """Return the text of a file, or "" if it does not exist."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as f:
        return f.read()


def pinned_torch(requirements):
    """Return the version of torch that a requirements file, or a file it includes, pins."""
    text = read(requirements)
    if include := re.search(r"^-r (\S+)", text, re.MULTILINE):
        return pinned_torch(include[1])
    return re.search(r"^torch==(\S+)", text, re.MULTILINE)[1]


def output_of(*command):
    """Return what a command prints, or "" if it fails or cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return "" if done.returncode else done.stdout.strip()


def torch_here():
    """Return this Python's torch version without its build ("2.13.0" for 2.13.0+cpu), or ""."""
    return output_of(sys.executable, "-c", "import torch; print(torch.__version__)").split("+")[0]


def make_venv(requirements):
    """Create .venv with the packages in a requirements file, unless it already has them."""
    if sys.version_info < OLDEST_PYTHON:
        version = ".".join(map(str, OLDEST_PYTHON))
        raise StepFailed(f"this needs Python {version} or newer: run make PYTHON=PATH")
    python = f"{sys.executable} {sys.version}"
    contents = python + "\n" + read("requirements.txt") + read(requirements)
    made_by, stamp = os.path.join(VENV, ".made-by"), os.path.join(VENV, f".has-{requirements}")
    if read(stamp) == contents:
        print(f"   already exists ({VENV})")
        return
    # an incomplete venv has no pip
    if read(made_by) != python or not output_of(venv_python(), "-m", "pip", "--version"):
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV])
        if made.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            raise StepFailed(
                "python -m venv failed; on Debian and Ubuntu, run: apt install python3-venv"
            )
        with open(made_by, "w", encoding="utf-8") as f:
            f.write(python)
    pin = pinned_torch(requirements)
    if torch_here() == pin:
        # these folders are searched after .venv's own packages, so every other pin still holds
        print(f"   using torch {pin} of {sys.executable}")
        folders = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = output_of(venv_python(), "-c", code)
        with open(os.path.join(packages, "torch_of_user.pth"), "w", encoding="utf-8") as f:
            f.writelines(f"{folder}\n" for folder in folders)
    call(venv_python(), "-m", "pip", "install", "--quiet", "--requirement", requirements)
    with open(stamp, "w", encoding="utf-8") as f:
        f.write(contents)


# ---- from nothing to a story


def parsed(text):
    """Return the object in a JSON text, or {} if the text is empty or cut off."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def finished(out_dir):
    """Whether a run's log ends with its last step."""
    *_, last = ["", *read(os.path.join(out_dir, "log.jsonl")).splitlines()]
    return parsed(last).get("reason") == "finished"


def complete(shards):
    """Whether a folder has all shards, with orders; earlier versions wrote none."""
    about = parsed(read(os.path.join(shards, "shards.json")))
    return about.get("complete", False) and bool(about.get("orders"))


def knows_orders(out_dir):
    """Whether a run's log says that its model was trained with orders."""
    first, *_ = [*read(os.path.join(out_dir, "log.jsonl")).splitlines(), ""]
    return parsed(first).get("model_args", {}).get("orders", False)


def step(number, title, done, action, *args):
    """Call action(*args) and print how long it took, unless its result `done` already exists."""
    print(f"[{number}/8] {title}", flush=True)
    if done:
        print(f"   already exists ({done})")
        return
    start = time.monotonic()
    action(*args)
    print(f"   took {time.monotonic() - start:.0f} s", flush=True)


def script(*args, **options):
    call(venv_python(), "-u", *args, raw=False, **options)


def train_model(model, flags):
    best = os.path.join(OUT, "best.pt")
    if finished(OUT) and os.path.exists(best):  # only model.bin is missing
        script("export.py", model, f"--checkpoint={best}")
        return

    def show_sample(line):  # lets the user watch the model learn
        if line.startswith("step ") and "the best so far" in line:
            text = output_of("./run", model, "-t", "0.7", "-s", "1", "-n", "40", "-i", PROMPT)
            print(f'   it writes: "{" ".join(text.split())} ..."', flush=True)

    args = [*flags, f"--out_dir={OUT}", "--resume=auto"]
    script("train.py", CONFIG, *args, on_line=show_sample)
    if not finished(OUT):
        raise StepFailed("training was stopped; run the same command to continue")


def write_page(model):
    """Write the model's web page and return its path; print why, and return "", if that fails."""
    page = os.path.join(OUT, "story.html")
    command = [venv_python(), "export.py", page, f"--checkpoint={model}", "--title=A storyteller"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = ["", *done.stderr.splitlines()][-1].removeprefix("error: ")
        print(f"   note: {page} was not written: {reason}")
        return ""
    return page


def story():
    flags = [f"--data_dir={DATA}", f"--vocab_size={VOCAB_SIZE}"]
    stories = os.path.join(DATA, "TinyStories_all_data")
    shards = os.path.join(DATA, f"tok{VOCAB_SIZE}")
    model = os.path.join(OUT, "model.bin")
    stages = (
        (f"a practice corpus of 20,000 stories in {stories}", "synth", stories),
        (f"a vocabulary of {VOCAB_SIZE} pieces", "train_vocab", f"{shards}.model"),
        ("the stories as tokens, and orders for them", "pretokenize", shards),
    )

    step(1, f"Python environment in {VENV}", "", make_venv, "requirements.txt")
    step(2, "the C engine, ./run", "", call, "make", "--no-print-directory", "run")
    for number, (title, stage, result) in enumerate(stages, 3):
        is_done = complete(result) if result == shards else os.path.exists(result)
        more = ["--orders"] * (result == shards)
        step(number, title, is_done and result, script, "tinystories.py", stage, *flags, *more)
    title = f"training a small model into {OUT} (about 2 minutes on two idle cores)"
    is_done = finished(OUT) and os.path.exists(model)
    step(6, title, is_done and model, train_model, model, flags)
    title, order = "a story", []
    if knows_orders(OUT):
        title, order = f"a story with the words {WORDS}", ["--words", WORDS]
    step(7, title, "", call, "./run", model, "-t", "0.7", "-i", PROMPT, *order)
    print("[8/8] the model as a web page", flush=True)
    page = write_page(model)
    if page:
        print(f"   wrote {page}: open it in a browser")
    print(
        f"""
Three commands to try next:
  ./run {model} -t 0.7 --words "ring, curious, park"
  {venv_python()} sample.py --out_dir={OUT} --start="There was once a" --num_samples=3
  {venv_python()} tinystories.py download    # the real TinyStories; see README.md"""
    )


def main(args):
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        if args == ["story"]:
            story()
        elif args[:1] == ["venv"] and len(args) == 2:
            make_venv(args[1])
        else:
            raise StepFailed("expected: story, or venv REQUIREMENTS_FILE")
    except StepFailed as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command to continue")


if __name__ == "__main__":
    main(sys.argv[1:])
