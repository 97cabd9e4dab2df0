"""
The folder of a training run: one run at a time, its log, and what an earlier run left.

log.jsonl has one JSON object a line; doc/log-fields.md explains them.
"""

import contextlib
import glob
import itertools
import json
import math
import os
import sys

from configurator import UserError
from system.files import atomic_write, copy_local, remove
from system.progress import print_line
from training.runlog import LOG

WORTH_KEEPING = ("ckpt*", "best.pt*")
COMPANIONS = (
    *("model.bin", "tokenizer.bin", "tokenizer.model", "loss.png", "stories.html"),
    *("wandb_id", "uploads", LOG),
)


class FolderInUse(UserError):
    """Another process writes there."""


class RunDir:
    """out_dir of one run, made where it is absent, and locked until the process ends."""

    def __init__(self, path):
        self.path, self.tokenizer = path, None
        if os.path.isfile(path):
            raise UserError(f"out_dir = {path} is a file: name a folder")
        self.claim()

    def claim(self):
        """Make the folder, lock it and tidy it."""
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"out_dir = {self.path} cannot be made ({e.strerror}): name a folder"
            ) from None
        self.lock()
        self.identity = os.stat(self.path)
        for part in self.find(f"{name}*.part" for name in (*WORTH_KEEPING, *COMPANIONS)):
            remove(part)  # of a run that was killed while it wrote

    def find(self, patterns):
        folder = glob.escape(self.path)
        return [path for p in patterns for path in glob.glob(os.path.join(folder, p))]

    def file(self, name):
        return os.path.join(self.path, name)

    def lock(self):
        """Raise FolderInUse where another run writes here: each would replace the other's files."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        # open, and so locked, until the process ends
        self.lock_file = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock_file)
            raise FolderInUse(
                f"another run is writing to {self.path}: wait for it, or give another --out_dir"
            ) from None
        except OSError:  # a file system without locks
            pass

    def add_tokenizer(self, tokenizer, path):
        """Write a tokenizer, of the file `path`: ./run and sample.py need it beside the model."""
        self.tokenizer = tokenizer, path
        tokenizer.export(self.file("tokenizer.bin"))
        copy_local(path, self.file("tokenizer.model"))

    def is_lost(self):
        """Whether the folder was moved or deleted since it was locked."""
        try:
            return not os.path.samestat(os.stat(self.path), self.identity)
        except FileNotFoundError:
            return True

    def begin_again(self):
        """
        Make and lock the folder again after it was moved or deleted, with the log so far. Raises
        FolderInUse where another run writes there by now.
        """
        what = f"{self.path} was moved or deleted"
        try:
            self.claim()
        except FolderInUse:
            raise FolderInUse(
                f"{what}, and another run writes there now: this run ends; what it saved is where "
                f"the folder was moved to"
            ) from None
        print_line(f"warning: {what}; the run goes on in a new {self.path}", sys.stderr)
        if os.path.exists(self.file(LOG)):  # of another run
            self.set_aside_earlier_run()
        self.log_file.seek(0)
        lines = self.log_file.read()
        self.log_file = open(self.file(LOG), "w+", encoding="utf-8")  # noqa: SIM115
        print(lines, end="", file=self.log_file, flush=True)
        if self.tokenizer:
            self.add_tokenizer(*self.tokenizer)

    def set_aside_earlier_run(self):
        """
        Move what an earlier run left to `previous`, or previous_2 and so on where there is one from
        before; a run without a checkpoint or a model is not kept. The next call completes one that
        was interrupted.
        """
        moving = self.file("moving")
        names = self.find(WORTH_KEEPING)
        is_worth = names or os.path.exists(self.file("model.bin"))
        if not is_worth and not os.path.isdir(moving):
            for name in ("wandb_id", "uploads"):  # which a new run must not go on with
                remove(self.file(name))
            return
        os.makedirs(moving, exist_ok=True)
        for name in (*filter(os.path.exists, map(self.file, COMPANIONS)), *names):
            os.replace(name, os.path.join(moving, os.path.basename(name)))
        names = (f"previous_{i}" if i > 1 else "previous" for i in itertools.count(1))
        previous = next(path for path in map(self.file, names) if not os.path.exists(path))
        os.replace(moving, previous)
        print(f"a new run begins; the earlier one in {self.path} is moved to {previous}")

    def open_log(self, step, evaluated):
        """
        Begin the log at step 0, or go on with it: lines of later steps and evaluations, which are
        done again, and a last one that was cut off are dropped.
        """
        path, kept = self.file(LOG), []
        if step and os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                lines = f.readlines()
            for line in lines:
                with contextlib.suppress(
                    ValueError, AttributeError, KeyError, TypeError, RecursionError
                ):
                    entry = json.loads(line)
                    if entry.get("step", 0) <= (evaluated if entry["kind"] == "eval" else step):
                        kept.append(line)
        with atomic_write(path, "w") as f:
            f.writelines(kept)
        self.log_file = open(path, "a+", encoding="utf-8")  # noqa: SIM115

    def log(self, kind, **values):
        """Append one line; floats get eight digits, and null where they are no number."""
        for key, value in values.items():
            if isinstance(value, float):
                values[key] = float(f"{value:.8g}") if math.isfinite(value) else None
        try:
            print(
                json.dumps({"kind": kind, **values}, allow_nan=False),
                file=self.log_file,
                flush=True,
            )
        except OSError as e:
            warning = f"warning: cannot write {self.file(LOG)} ({e.strerror}); training goes on"
            print_line(warning, sys.stderr)
