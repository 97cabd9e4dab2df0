"""
From a fresh clone to a story, with the standard library alone; what `make` calls.

    python system/bootstrap.py story  # environment, engine, corpus, training, a story
    python system/bootstrap.py venv requirements-dev.txt  # the environment in .venv alone

Each step is skipped where its result is there already. The Python that runs this file is the one
.venv is made from; if it has a torch that fits the pin, .venv uses that instead of a new download.
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
PROMPT = "Once upon a time"
OLDEST_PYTHON = (3, 10)


class StepFailed(Exception):
    """A command of a step failed; it has said why."""


def call(*command, shown=True, after=lambda line: None):
    """
    Run a command; raise StepFailed unless it succeeds. Its output is shown as it is, or with
    shown=False indented and without the hints that its steps here do not need; after(line) is
    called for each of its lines then.
    """
    # Ctrl-C reaches the command as well, which may have something to save: wait for it
    interrupts = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        pipe = None if shown else subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, text=True) as process:
            for line in process.stdout or ():
                if line.strip() and not line.startswith("next: "):
                    print("   " + line, end="", flush=True)
                after(line)
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
    """The text of a file, "" where there is none."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as f:
        return f.read()


def pinned_torch(requirements):
    """The version that a requirements file, or one it includes, pins torch to."""
    text = read(requirements)
    if include := re.search(r"^-r (\S+)", text, re.MULTILINE):
        return pinned_torch(include[1])
    return re.search(r"^torch==(\S+)", text, re.MULTILINE)[1]


def output_of(*command):
    """What a command prints, or "" if it fails or cannot be run."""
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return "" if found.returncode else found.stdout.strip()


def torch_here():
    """The version of this Python's torch without its build ("2.13.0" of 2.13.0+cpu), or ""."""
    return output_of(sys.executable, "-c", "import torch; print(torch.__version__)").split("+")[0]


def make_venv(requirements):
    """Make .venv with the packages of a requirements file; nothing is done where it has them."""
    if sys.version_info < OLDEST_PYTHON:
        raise StepFailed(f"Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer is needed")
    maker = f"{sys.executable} {sys.version}"
    wanted = maker + "\n" + read("requirements.txt") + read(requirements)
    made_by, stamp = os.path.join(VENV, ".made-by"), os.path.join(VENV, f".has-{requirements}")
    if read(stamp) == wanted:
        print(f"   there already ({VENV})")
        return
    # a venv that was left half-made has no pip
    if read(made_by) != maker or not output_of(venv_python(), "-m", "pip", "--version"):
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV])
        if made.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            raise StepFailed(
                "python -m venv fails; on Debian and Ubuntu it needs: apt install python3-venv"
            )
        with open(made_by, "w", encoding="utf-8") as f:
            f.write(maker)
    pin = pinned_torch(requirements)
    if torch_here() == pin:
        # seen behind .venv's own packages, so every other pin still holds
        print(f"   using the torch {pin} that {sys.executable} has")
        folders = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = output_of(venv_python(), "-c", code)
        with open(os.path.join(packages, "torch_of_user.pth"), "w", encoding="utf-8") as f:
            f.writelines(f"{folder}\n" for folder in folders)
    call(venv_python(), "-m", "pip", "install", "--quiet", "--requirement", requirements)
    with open(stamp, "w", encoding="utf-8") as f:
        f.write(wanted)


# ---- from nothing to a story


def parsed(text):
    """The object in a JSON text; {} if there is none, or only a part of it."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def finished(out_dir):
    """Whether the log of a run says that it reached its last step."""
    *_, last = ["", *read(os.path.join(out_dir, "log.jsonl")).splitlines()]
    return parsed(last).get("reason") == "finished"


def complete(shards):
    return parsed(read(os.path.join(shards, "shards.json"))).get("complete", False)


def step(number, title, done, action, *words):
    """Call action(*words) and print how long it took, or say that its result `done` is there."""
    print(f"[{number}/7] {title}", flush=True)
    if done:
        print(f"   there already ({done})")
        return
    begin = time.monotonic()
    action(*words)
    print(f"   took {time.monotonic() - begin:.0f} s", flush=True)


def script(*words, **options):
    call(venv_python(), "-u", *words, shown=False, **options)


def train_model(model, flags):
    best = os.path.join(OUT, "best.pt")
    if finished(OUT) and os.path.exists(best):  # only model.bin was deleted
        script("export.py", model, f"--checkpoint={best}")
        return

    def tell(line):  # so that one sees it learn
        if line.startswith("step ") and "the best so far" in line:
            text = output_of("./run", model, "-t", "0.7", "-s", "1", "-n", "40", "-i", PROMPT)
            print(f'   it tells: "{" ".join(text.split())} ..."', flush=True)

    words = [f"--out_dir={OUT}", "--resume=auto"]
    script("train.py", CONFIG, *flags, *words, after=tell)
    if not finished(OUT):
        raise StepFailed("training was stopped; the same command goes on from there")


def story():
    flags = [f"--data_dir={DATA}", f"--vocab_size={VOCAB_SIZE}"]
    stories = os.path.join(DATA, "TinyStories_all_data")
    shards = os.path.join(DATA, f"tok{VOCAB_SIZE}")
    model = os.path.join(OUT, "model.bin")
    stages = (
        (f"a practice corpus of 20,000 stories in {stories}", "synth", stories),
        (f"a vocabulary of {VOCAB_SIZE} pieces", "train_vocab", f"{shards}.model"),
        ("the stories as tokens", "pretokenize", shards),
    )

    step(1, f"Python environment in {VENV}", "", make_venv, "requirements.txt")
    step(2, "the C engine, ./run", "", call, "make", "--no-print-directory", "run")
    for number, (title, stage, result) in enumerate(stages, 3):
        is_done = complete(result) if result == shards else os.path.exists(result)
        step(number, title, is_done and result, script, "tinystories.py", stage, *flags)
    title = f"training a small model into {OUT} (about 2 minutes on two idle cores)"
    is_done = finished(OUT) and os.path.exists(model)
    step(6, title, is_done and model, train_model, model, flags)
    step(7, "a story", "", call, "./run", model, "-t", "0.7", "-i", PROMPT)
    print(
        f"""
Three commands to try next:
  ./run {model} -t 0.7 -i "One day, a little fox"
  {venv_python()} sample.py --out_dir={OUT} --start="There was once a" --num_samples=3
  {venv_python()} tinystories.py download    # the real TinyStories; README.md goes on from there"""
    )


def main(words):
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        if words == ["story"]:
            story()
        elif words[:1] == ["venv"] and len(words) == 2:
            make_venv(words[1])
        else:
            raise StepFailed("expected: story, or venv REQUIREMENTS_FILE")
    except StepFailed as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from here")


if __name__ == "__main__":
    main(sys.argv[1:])
