"""The log of a training run, log.jsonl: read whole, or again and again while the run writes it."""

import contextlib
import json
import os
from dataclasses import dataclass, field

from training.rundir import LOG


@dataclass(eq=False)
class RunLog:
    """The lines of a run's log by kind. `read` continues where it stopped."""

    folder: str
    start: dict = field(default_factory=dict)
    train: list = field(default_factory=list)  # lines of kind "train"
    evals: list = field(default_factory=list)  # lines of kind "eval"
    end: dict = field(default_factory=dict)
    offset: int = 0  # bytes read so far
    inode: int = 0

    @property
    def path(self):
        return os.path.join(self.folder, LOG)

    @property
    def best(self):
        """The evaluation with the lowest validation loss; {} without any."""
        known = [line for line in self.evals if line["val_loss"] is not None]
        return min(known, key=lambda line: line["val_loss"], default={})

    def read(self):
        """
        Add the lines written since the last call, and return the log. A resumed or restarted run
        replaces its log; that one is read from its first line.
        """
        try:
            with open(self.path, "rb") as f:
                now = os.fstat(f.fileno())
                if now.st_ino != self.inode or now.st_size < self.offset:
                    self.start, self.train, self.evals, self.end = {}, [], [], {}
                    self.offset, self.inode = 0, now.st_ino
                f.seek(self.offset)
                text = f.read()
        except FileNotFoundError:
            return self
        complete = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        self.offset += len(complete)
        for line in complete.splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                self.add(json.loads(line))
        return self

    def add(self, line):
        kind = line.get("kind")
        if kind in ("train", "eval"):
            (self.train if kind == "train" else self.evals).append(line)
            self.end = {}  # the run continued
        elif kind == "start":
            self.start, self.end = line, {}
        elif kind == "end":
            self.end = line
