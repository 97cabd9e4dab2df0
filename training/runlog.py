"""
The log of a training run, log.jsonl: read at once, or incrementally while the run writes it.

A log may come from a stranger or a damaged disk. FIELDS describes valid lines, and parse_line()
drops all others before other code sees them.
"""

import json
import os
from dataclasses import dataclass, field

from system.fields import each, fits, is_count, is_number, is_scalar, is_size, is_text, optional

LOG = "log.jsonl"
MAX_LINE_BYTES = 1 << 20  # train.py's lines are shorter than 10,000 bytes
MAX_LINES = 50_000  # lines kept per kind; beyond that every second, every fourth ...

# ---- the lines of a log; doc/log-fields.md explains the fields

# settings that readers of a log use
SETTINGS = {
    **dict.fromkeys(("max_iters", "max_seq_len", "batch_size", "vocab_size"), is_count),
    **dict.fromkeys(("data_dir", "vocab_source"), lambda value: type(value) is str),
    "max_minutes": is_size,
}


def is_config(value):
    return each(is_scalar)(value) and fits(value, {k: v for k, v in SETTINGS.items() if k in value})


PROGRESS = {"step": is_count, "tokens": is_count, "time_s": is_size, "train_s": is_size}
FIELDS = {
    "start": {"config": is_config},
    "train": {**PROGRESS, "loss": optional(is_number)},
    "eval": {**PROGRESS, "val_loss": optional(is_number), "val_bpb": optional(is_number)},
    "end": {**PROGRESS, "reason": is_text},
}
# absent if unknown, or in logs of other versions
OPTIONAL = {
    **dict.fromkeys(("n_params", "train_tokens", "valid_tokens", "processes", "threads"), is_count),
    **dict.fromkeys(("commit", "compute_dtype", "device", "device_name"), is_text),
    **dict.fromkeys(("platform", "python", "torch"), is_text),
    **dict.fromkeys(("lr", "grad_norm", "mfu", "tok_s", "peak_flops"), optional(is_size)),
    **dict.fromkeys(("coverage", "flops_per_token"), is_size),
    "best_val_loss": optional(is_number),
    "model_args": each(is_scalar),
    "rates": each(lambda value: is_number(value) and value > 1e-40),
}


def parse_line(text):
    """Return a log line as {known field: value}, or None if train.py could not have written it."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kind = line.get("kind") if type(line) is dict else None
    if type(kind) is not str or kind not in FIELDS:
        return None
    checks = FIELDS[kind] | {name: OPTIONAL[name] for name in OPTIONAL if name in line}
    return {"kind": kind} | {name: line[name] for name in checks} if fits(line, checks) else None


@dataclass(eq=False)
class RunLog:
    """The lines of a run's log by kind. `read` continues from where it stopped."""

    folder: str
    start: dict = field(default_factory=dict)
    train: list = field(default_factory=list)  # lines of kind "train"
    evals: list = field(default_factory=list)  # lines of kind "eval"
    end: dict = field(default_factory=dict)
    best: dict = field(default_factory=dict)  # the evaluation with the lowest loss, if any
    n_skipped: int = 0  # invalid lines
    stride: int = 1  # every stride-th training line is kept
    n_passed: int = 0  # training lines since the last one kept
    offset: int = 0  # bytes read
    inode: int = 0

    @property
    def path(self):
        return os.path.join(self.folder, LOG)

    def read(self):
        """
        Add the lines written since the last call and return the log. If a resumed or restarted run
        has replaced the file, read it from the start. Only a regular file is opened.
        """
        if not os.path.isfile(self.path):
            return self
        with open(self.path, "rb") as f:
            now = os.fstat(f.fileno())
            if now.st_ino != self.inode or now.st_size < self.offset:
                self.start, self.train, self.evals, self.end, self.best = {}, [], [], {}, {}
                self.n_skipped, self.stride, self.n_passed = 0, 1, 0
                self.offset, self.inode = 0, now.st_ino
            f.seek(self.offset)
            passed = b""
            while text := f.readline(MAX_LINE_BYTES):
                is_whole = text.endswith(b"\n")
                if not is_whole and len(text) < MAX_LINE_BYTES:
                    break  # incomplete
                self.offset += len(text)
                self.n_passed += 1
                is_train = text.startswith(b'{"kind": "train"')
                if is_train and self.n_passed < self.stride:
                    passed = text  # saves the time to parse it
                elif is_whole:  # only the end of an overlong line gets here, and is skipped
                    if passed and not is_train:  # the last step before an evaluation or the end
                        self.add(passed)
                    passed = b""
                    self.add(text)
            if passed:  # the latest step is always kept
                self.add(passed)
        return self

    def add(self, text):
        line = parse_line(text)
        kind = line and line["kind"]
        if kind == "start":
            self.start, self.end = line, {}
        elif kind == "end":
            self.end = line
        elif kind == "train":
            self.train.append(line)
            self.end, self.n_passed = {}, 0  # the run continued
            if len(self.train) > MAX_LINES:
                self.train, self.stride = self.train[::-2][::-1], 2 * self.stride
        elif kind == "eval":
            self.evals.append(line)
            self.end = {}
            if line["val_loss"] is not None and (
                not self.best or line["val_loss"] < self.best["val_loss"]
            ):
                self.best = line
            if len(self.evals) > MAX_LINES:
                self.evals = self.evals[::-2][::-1]
        elif text.strip():
            self.n_skipped += 1
