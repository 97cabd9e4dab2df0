"""
The folder of a training run: its lock, its log, and the files of earlier runs.

log.jsonl has one JSON object per line; doc/log-fields.md explains the fields.
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
    """Another process is writing to the folder."""


class RunDir:
    """The out_dir of one run: created if missing, and locked until the process ends."""

    def __init__(self, path):
        self.path, self.tokenizer = path, None
        if os.path.isfile(path):
            raise UserError(f"out_dir = {path} is a file: use a folder")
        self.claim()

    def claim(self):
        """Create the folder, lock it and delete incomplete files."""
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot write out_dir = {self.path}: {e.strerror}") from None
        self.lock()
        self.identity = os.stat(self.path)
        for part in self.find(f"{name}*.part" for name in (*WORTH_KEEPING, *COMPANIONS)):
            remove(part)  # left by a run that was killed while writing

    def find(self, patterns):
        folder = glob.escape(self.path)
        return [path for p in patterns for path in glob.glob(os.path.join(folder, p))]

    def file(self, name):
        return os.path.join(self.path, name)

    def lock(self):
        """Raise FolderInUse if another run writes here: they would replace each other's files."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        # stays open, and so locked, until the process ends
        self.lock_file = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock_file)
            raise FolderInUse(
                f"another run is writing to {self.path}: wait for it, or use another --out_dir"
            ) from None
        except OSError:  # a file system without locks
            pass

    def add_tokenizer(self, tokenizer, path):
        """Write a tokenizer, loaded from `path`, next to the model for ./run and sample.py."""
        self.tokenizer = tokenizer, path
        tokenizer.export(self.file("tokenizer.bin"))
        copy_local(path, self.file("tokenizer.model"))

    def is_lost(self):
        """Return whether the folder was moved or deleted since it was locked."""
        try:
            return not os.path.samestat(os.stat(self.path), self.identity)
        except FileNotFoundError:
            return True

    def recreate(self):
        """
        Create and lock the folder again after it was moved or deleted, and restore the log. Raises
        FolderInUse if another run is writing there now.
        """
        cause = f"{self.path} was moved or deleted"
        try:
            self.claim()
        except FolderInUse:
            raise FolderInUse(
                f"{cause}, and another run is writing there now: this run stops; its checkpoints "
                f"are in the moved folder"
            ) from None
        print_line(f"warning: {cause}; the run continues in a new {self.path}", sys.stderr)
        if os.path.exists(self.file(LOG)):  # from another run
            self.set_aside_earlier_run()
        self.log_file.seek(0)
        lines = self.log_file.read()
        self.log_file = open(self.file(LOG), "w+", encoding="utf-8")  # noqa: SIM115
        print(lines, end="", file=self.log_file, flush=True)
        if self.tokenizer:
            self.add_tokenizer(*self.tokenizer)

    def set_aside_earlier_run(self):
        """
        Move the files of an earlier run to previous/, or previous_2/ and so on if that exists. A
        run without a checkpoint or a model is not kept. If a call is interrupted, the next one
        completes it.
        """
        moving = self.file("moving")
        checkpoints = self.find(WORTH_KEEPING)
        has_model = checkpoints or os.path.exists(self.file("model.bin"))
        if not has_model and not os.path.isdir(moving):
            for name in ("wandb_id", "uploads"):  # a new run must not continue these
                remove(self.file(name))
            return
        os.makedirs(moving, exist_ok=True)
        for path in (*filter(os.path.exists, map(self.file, COMPANIONS)), *checkpoints):
            os.replace(path, os.path.join(moving, os.path.basename(path)))
        names = (f"previous_{i}" if i > 1 else "previous" for i in itertools.count(1))
        previous = next(path for path in map(self.file, names) if not os.path.exists(path))
        os.replace(moving, previous)
        print(f"note: moved the earlier run in {self.path} to {previous}")

    def open_log(self, step, evaluated):
        """
        Start the log at step 0, or continue it: drop lines of later steps and evaluations, which
        will be repeated, and an incomplete last line.
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
        """Append one line; floats are rounded to eight digits, and NaN and infinity become null."""
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
            error = f"cannot write {self.file(LOG)}: {e.strerror}"
            print_line(f"warning: {error}; training continues", sys.stderr)
