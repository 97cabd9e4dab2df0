"""
Checkpoints: everything a run needs to continue as if it had never stopped.

In out_dir, ckpt.pt is the latest checkpoint, ckpt_000200.pt is from an earlier step, and best.pt
has the lowest validation loss. Each is a dict of plain values and tensors:

    model            state dict of the Transformer
    model_args       ModelArgs as a dict
    optimizer        {"<parameter>.<name>": tensor}, the optimizer state
    iter_num         steps done
    n_sequences      training sequences seen: the position of the data loader
    n_windows        sequences per epoch
    evaluated        step of the last evaluation
    train_s          seconds of training
    best_val_loss    lowest validation loss, nats per token
    scaler           state of the float16 gradient scaler; empty for other dtypes
    tokenizer_hash   hash of the tokenizer model; "" if unknown
    config           the settings of train.py
    data_path        data_dir relative to out_dir, to find it from another folder
    compute_dtype    dtype of matrix products
    versions         versions of Python and the packages
    format           FORMAT

A file is written under a temporary name and renamed, so it is complete or absent. It is loaded with
weights_only, so a stranger's checkpoint cannot run code, and its checksums are verified, which
torch.load does not do. llama2.c's checkpoints use the same names for model, model_args and
iter_num; they can be exported, sampled and fine-tuned.

Under FSDP a checkpoint is a folder with the same name: the tensors as torch.distributed.checkpoint
writes them, one part per process, and run.pt with everything else.
"""

import contextlib
import glob
import math
import os
import pickle
import re
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from configurator import UserError
from model import ModelArgs, Transformer
from optim import shard_like, warmup_steps
from system.fields import each, fits, is_count, is_scalar, is_size, is_string, is_text
from system.files import (
    atomic_write,
    checksum,
    flush_folder,
    link_or_copy,
    remove,
    replace,
)
from system.progress import print_line
from training import parallel, torchfile
from training.runlog import is_config

FORMAT = 2
ZERO_IF_MISSING = ".neuron_sizes"  # optimizer state that starts at 0 if the checkpoint lacks it
LATEST, BEST = "ckpt.pt", "best.pt"
RUN_FILE = "run.pt"  # in a sharded checkpoint
SCALER = "scale growth_factor backoff_factor growth_interval _growth_tracker".split()

# checks, for fields.fits, of fields that any checkpoint may have
FIELDS = {
    "model": torchfile.is_state,
    "model_args": each(is_scalar),
    "config": is_config,
    "tokenizer_hash": is_text,
    "files": lambda value: type(value) is dict,
    **dict.fromkeys("format iter_num n_sequences n_windows evaluated".split(), is_count),
    "train_s": is_size,
}
# fields that a run needs to be resumed; in llama2.c's checkpoints some have other types
RUN_FIELDS = {
    **{name: FIELDS[name] for name in FIELDS if name not in ("model", "files")},
    "config": lambda value: is_config(value) and fits(value, {"data_dir": is_string}),
    "best_val_loss": lambda value: type(value) is float and value >= 0,  # starts at infinity
    "scaler": lambda value: value == {} or fits(value, dict.fromkeys(SCALER, is_size)),
    "versions": lambda value: fits(value, dict.fromkeys(versions(), is_text)),
    "compute_dtype": lambda value: value in DTYPES,
}
# absent from sharded checkpoints, or from those of earlier versions
OPTIONAL = {"optimizer": torchfile.is_state, "data_path": is_string}
DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")


@dataclass
class RunState:
    """The state of a run; each field is an entry of its checkpoints."""

    iter_num: int = 0  # steps done
    n_sequences: int = 0  # training sequences seen: the position of the data loader
    evaluated: int = 0  # step of the last evaluation
    train_s: float = 0.0  # seconds of training, without start-up, compilation, evaluation, saving
    best_val_loss: float = math.inf  # lowest validation loss, nats per token

    @classmethod
    def of(cls, checkpoint):
        return cls(**{name: checkpoint[name] for name in cls.__dataclass_fields__})

    def seconds(self, since):
        """Return the first rank's seconds of training; since: time of the last log line."""
        now = self.train_s + (time.perf_counter() - since if since else 0.0)
        return parallel.total(now if parallel.FIRST else 0.0)[0]

    def is_done(self, settings, since=None):
        """Return whether the last step is done."""
        if settings.max_minutes:
            return self.seconds(since) >= 60 * settings.max_minutes
        return self.iter_num >= settings.max_iters

    def part_done(self, settings, since):
        """
        Return the part done, 0 to 1, of the minutes or of the steps after the warm-up (in it, less
        than 0).
        """
        if settings.max_minutes:
            return self.seconds(since) / (60 * settings.max_minutes)
        warmup = warmup_steps(settings)
        return (self.iter_num - warmup) / (settings.max_iters - warmup)


class Damaged(UserError):
    """A file that is damaged or not a checkpoint; another one may be intact."""


# ---- what is saved


def versions():
    return {
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "torch": torch.__version__.partition("+")[0],
    }


def optimizer_tensors(model, optimizer):
    """Return {"<parameter>.<name>": tensor} of an optimizer's state: references, not copies."""
    if not optimizer.state:
        allocate(optimizer)
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}.{key}": tensor
        for p, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def allocate(optimizer):
    """Make an optimizer create its state by taking a step that changes no parameter."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def tensors_of(model, optimizer):
    """Return {name: tensor} of a model and its optimizer (or None), as in sharded checkpoints."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    state = optimizer_tensors(model, optimizer) if optimizer else {}
    return tensors | {f"optimizer.{name}": t for name, t in state.items()}


class Snapshot:
    """
    Copies a run's tensors to main memory, into the same buffers each time: allocating new ones
    would take longer than the copy.
    """

    def __init__(self):
        self.buffers = {}

    def take(self, value):
        """Return a nested dict with every tensor copied; tied tensors stay tied."""
        self.seen = {}
        copy = self.copied(value, ())
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies were only queued
        return copy

    def copied(self, value, path):
        if isinstance(value, dict):
            return {k: self.copied(v, (*path, k)) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        same = (value.data_ptr(), value.shape, value.dtype)
        if same not in self.seen:
            if path not in self.buffers:
                on_gpu = value.device.type == "cuda"
                self.buffers[path] = torch.empty_like(value, device="cpu", pin_memory=on_gpu)
            self.seen[same] = self.buffers[path].copy_(value.detach(), non_blocking=value.is_cuda)
        return self.seen[same]


# ---- writing


class CheckpointWriter:
    """
    Writes the checkpoints of one run to `folder` in the background: training continues as soon as
    the tensors are copied. Keeps the latest keep_last checkpoints and the best one. If a save
    fails, for example because the disk is full, it prints a warning and sets `error` (and
    best_failed if it was the best model); the next save tries again. latest_step is the step of
    the existing ckpt.pt, or None. on_saved(path, step) is called for each new checkpoint.
    """

    def __init__(self, folder, keep_last, latest_step=None, on_saved=None):
        self.folder, self.keep_last, self.latest_step = folder, keep_last, latest_step
        self.on_saved = on_saved
        self.latest = os.path.join(folder, LATEST)
        self.snapshot, self.thread = Snapshot(), None
        self.error, self.best_failed = None, False

    def save(self, checkpoint, is_best=False):
        """Start saving, after waiting for an earlier save to finish."""
        self.wait()
        with self.warn_on_failure(is_best):
            copy = self.snapshot.take(checkpoint)
            self.thread = threading.Thread(
                target=self.write, args=(copy, is_best), name=parallel.CHECKPOINT_THREAD
            )
            self.thread.start()

    def lost_best(self):
        """Return whether any rank failed to write the best model since the last call."""
        failed, self.best_failed = self.best_failed, False
        return parallel.any_rank(failed)

    def wait(self):
        """Wait until nothing is being written."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def write(self, checkpoint, is_best):
        part, self.error = f"{self.latest}.{os.getpid()}.part", None
        with self.warn_on_failure(is_best, part):
            save_file(part, checkpoint)
            self.install(part, checkpoint["iter_num"], is_best)

    def save_sharded(self, checkpoint, model, optimizer, is_best=False):
        """
        Save parameters that are sharded over the ranks. Every rank must call this; it returns when
        everything is written.
        """
        part, step = f"{self.latest}.sharded.part", checkpoint["iter_num"]

        def prepare():
            if parallel.FIRST:
                remove(part)
                os.makedirs(part)

        def write_tensors():
            from training import sharded

            sharded.write(part, tensors_of(model, optimizer))

        def finish():
            if parallel.FIRST:
                files = {name: checksum(os.path.join(part, name)) for name in os.listdir(part)}
                save_file(os.path.join(part, RUN_FILE), {**checkpoint, "files": files})
                self.install(part, step, is_best)

        self.error = None
        for job in (prepare, write_tensors, finish):
            with self.warn_on_failure(is_best, part):
                job()
            if parallel.any_rank(self.error is not None):
                self.error = self.error or "another rank cannot write its part of the checkpoint"
                return
        self.latest_step = step

    @contextlib.contextmanager
    def warn_on_failure(self, is_best, part=None):
        try:
            yield
        except Exception as e:  # for a full disk, torch and dcp raise errors of different types
            if part:
                remove(part)
            self.best_failed = self.best_failed or is_best
            self.error = f"cannot write {self.latest}: {reason(e)}"
            latest = f"the checkpoint of step {self.latest_step} is kept; " * bool(self.latest_step)
            print_line(f"warning: {self.error}; {latest}the next save will try again", sys.stderr)

    def install(self, part, step, is_best):
        """Rename `part` to ckpt.pt, and the earlier ckpt.pt to the name with its step."""
        if is_best:  # first: if killed before the rename below, the resumed run repeats this
            best = os.path.join(self.folder, BEST)
            link_or_copy(part, f"{best}.part")
            replace(f"{best}.part", best)
        if os.path.exists(self.latest) and self.latest_step not in (None, step):
            older = os.path.join(self.folder, checkpoint_name(self.latest_step))
            remove(older)
            link_or_move(self.latest, older)
        replace(part, self.latest)
        self.latest_step = step
        flush_folder(self.folder)
        if self.on_saved:
            self.on_saved(self.latest, step)
        for path in earlier_checkpoints(self.folder)[self.keep_last - 1 :]:
            remove(path)


def save_file(path, value):
    """Write `value` with torch.save and flush it to disk. Raises UserError with the reason."""
    try:
        with atomic_write(path) as f:
            torch.save(value, f)
    except (OSError, RuntimeError) as e:
        raise UserError(reason(e)) from None


def reason(error):
    """Return why writing failed, in a few words."""
    while error.__cause__ or error.__context__:  # torch wraps the system's error
        error = error.__cause__ or error.__context__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def link_or_move(path, target):
    """Hard-link a file to `target`; if that is impossible (a folder), rename it."""
    try:
        os.link(path, target)
    except OSError:
        os.replace(path, target)


def checkpoint_name(step):
    return f"ckpt_{step:06}.pt"


def earlier_checkpoints(folder):
    """Return the paths of the checkpoints with a step in their name, latest first."""
    paths = glob.glob(os.path.join(glob.escape(folder), "ckpt_*.pt"))
    return sorted(filter(step_of, paths), key=step_of, reverse=True)


def step_of(path):
    """Return the step in a checkpoint's name, or 0 if there is none."""
    match = re.fullmatch(r"ckpt_(\d+)\.pt", os.path.basename(path))
    return int(match[1]) if match else 0


# ---- reading


def load_checkpoint(path, device="cpu"):
    """
    Read a checkpoint, or everything but the tensors of a sharded one. Raises UserError if it is
    damaged or not a checkpoint, and suggests an earlier one if there is one.
    """
    try:
        return read_checkpoint(path, device)
    except UserError as e:
        earlier = earlier_checkpoints(os.path.dirname(path))
        is_newest = os.path.basename(path) in (LATEST, BEST)
        hint = f"; an earlier checkpoint is {earlier[0]}" if earlier and is_newest else ""
        raise UserError(f"{e}{hint}") from None


def read_checkpoint(path, device="cpu"):
    """load_checkpoint() without the hint."""
    if os.path.isdir(path):
        file = os.path.join(path, RUN_FILE)
        if not os.path.exists(file) and os.path.exists(os.path.join(path, LATEST)):
            best = next(n for n in (BEST, LATEST) if os.path.exists(os.path.join(path, n)))
            best = os.path.join(path, best)
            raise UserError(f"{path} is not a checkpoint: it is the folder of a run; use {best}")
        if os.path.exists(os.path.join(path, "config.json")):
            raise UserError(
                f"{path} is not a checkpoint: it is a Hugging Face folder; convert it with: "
                f"python export.py imported/ckpt.pt --from-hf={path}"
            )
        if not os.path.exists(file):
            raise Damaged(f"{path} is not a sharded checkpoint: the folder has no {RUN_FILE}")
        checkpoint, needed = load_file(file, device), ("files", "model_args")
    else:
        checkpoint, needed = load_file(path, device), ("model", "model_args")
    if not isinstance(checkpoint, dict) or any(name not in checkpoint for name in needed):
        raise Damaged(f"{path} is not a checkpoint: expected the fields {' and '.join(needed)}")
    check_fields(checkpoint, path)
    for name, expected in checkpoint.get("files", {}).items() if os.path.isdir(path) else ():
        name = os.path.join(path, os.path.basename(str(name)))
        if not os.path.isfile(name) or checksum(name) != expected:
            raise Damaged(f"{path} is damaged: {name} is missing or has changed")
    return checkpoint


def check_fields(checkpoint, path):
    """Raise UserError for a field that a run could not have saved."""
    fields = FIELDS
    if is_count(checkpoint.get("format")) and checkpoint["format"] == FORMAT:
        fields = FIELDS | OPTIONAL | {n: RUN_FIELDS[n] for n in RUN_FIELDS if n in checkpoint}
    for name, check in fields.items():
        if name in checkpoint and not check(checkpoint[name]):
            raise Damaged(f"{path} is not a checkpoint of this program: its {name} is invalid")
    try:
        ModelArgs.from_dict(checkpoint["model_args"])
    except ValueError as e:
        raise UserError(f"the model in {path} is not supported: {e}") from None
    if checkpoint.get("evaluated", 0) > checkpoint.get("iter_num", math.inf):
        raise Damaged(f"{path} is not a checkpoint of this program: evaluated exceeds iter_num")


def check_size(args, checkpoint, path):
    """
    Raise UserError if a model of ModelArgs has more parameters than the checkpoint from `path` can
    hold. Call this before allocating memory for the model.
    """
    if "model" in checkpoint:
        storages = [tensor.untyped_storage() for tensor in checkpoint["model"].values()]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}.values()
    else:
        sizes = [os.path.getsize(os.path.join(path, name)) for name in os.listdir(path)]
    limit = sum(sizes) // 2  # at least two bytes per parameter
    n_params = 2 * args.n_layers * args.dim**2  # wq and wo alone
    if n_params <= limit:
        with torch.device("meta"):
            n_params = Transformer(args).n_params()
    if n_params > limit:
        raise UserError(
            f"{path} does not fit this model: it is too short for {n_params:,} parameters"
        )


def load_file(path, device):
    if not os.path.exists(path):
        earlier = os.path.join(os.path.dirname(path), "previous")
        hint = f"; an earlier run is in {earlier}" if os.path.isdir(earlier) else ""
        raise UserError(f"{path} does not exist; train a model with: python train.py{hint}")
    try:
        return torchfile.load(path, device)
    except UserError:
        raise
    except OSError as e:  # the file may be intact and readable later
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except pickle.UnpicklingError:
        raise Damaged(
            f"{path} was not loaded: it holds more than tensors and plain values, and could run "
            f"code or exhaust the memory"
        ) from None
    except Exception as e:  # arbitrary bytes can cause any error
        if isinstance(e, MemoryError) or "allocate" in str(e):
            raise UserError(f"not enough memory for {path}: free some and try again") from None
        raise Damaged(f"{path} is damaged or not a checkpoint of this program") from None


def has_checkpoint(folder):
    """Return whether a folder has any checkpoint, intact or damaged."""
    return any(os.path.exists(os.path.join(folder, n)) for n in (LATEST, BEST)) or bool(
        earlier_checkpoints(folder)
    )


def load_latest(folder):
    """
    Return (checkpoint, path, damaged): the latest intact checkpoint of a run, and the paths of
    damaged ones. If ckpt.pt is damaged, print which one is used instead. Return (None, None, [])
    if there is no checkpoint. Raises UserError if all are damaged, or if one cannot be read, since
    it may still be intact.
    """
    latest, best = os.path.join(folder, LATEST), os.path.join(folder, BEST)
    paths = [path for path in (latest, best, *earlier_checkpoints(folder)) if os.path.exists(path)]
    intact, damaged, cause = [], [], f"{latest} does not exist"
    for path in paths:
        try:
            intact.append((read_checkpoint(path), path))
        except Damaged as e:
            cause = str(e) if not damaged else f"{cause}; so is {path}"
            damaged.append(path)
        if intact and path != best:  # later paths have earlier steps
            break
    if damaged and not intact:
        raise UserError(
            f"{cause}; no other checkpoint in {folder} is intact: to start from scratch, use "
            f"another --out_dir"
        )
    if not intact:
        return None, None, []
    checkpoint, path = max(intact, key=lambda pair: pair[0].get("iter_num", 0))
    if RUN_FIELDS.keys() - checkpoint.keys():
        raise UserError(
            f"{path} has weights but no run to resume: to start from the weights, use "
            f"--init_from={path} and another --out_dir"
        )
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path} is from another version of this program and cannot be resumed")
    if path != latest:
        parallel.say(f"{cause}; resuming from {path}, step {checkpoint['iter_num']}")
    return checkpoint, path, damaged


def set_aside(folder, damaged, step):
    """
    Rename checkpoints that rotation would otherwise move or delete: damaged ones and, when resuming
    from an earlier step, those of later steps.
    """
    for path in damaged:
        replace(path, f"{path}.damaged")
        print(f"renamed {path} to {path}.damaged")
    for path in earlier_checkpoints(folder):
        if step_of(path) > step:
            replace(path, f"{path}.later")
            print(f"renamed {path}, which is from a later step, to {path}.later")


def restore(model, optimizer, checkpoint, path):
    """
    Set a model's parameters, and an optimizer's state unless it is None, from a checkpoint written
    by any number of processes; `path` is its file or folder.
    """
    try:
        targets = tensors_of(model, optimizer)
        if os.path.isdir(path):
            from training import sharded

            sharded.read(path, targets, ZERO_IF_MISSING)
            return
        source = {f"model.{name}": t for name, t in plain_state(checkpoint).items()}
        if optimizer:
            source |= {f"optimizer.{k}": t for k, t in checkpoint["optimizer"].items()}
        with torch.no_grad():
            for name, target in targets.items():
                if name not in source and name.endswith(ZERO_IF_MISSING):
                    continue
                value = source[name].to(target.device)
                if value.shape != target.shape:
                    raise ValueError(
                        f"{name} is {tuple(value.shape)}, expected {tuple(target.shape)}"
                    )
                if hasattr(target, "full_tensor"):  # sharded over the ranks
                    value = shard_like(target, value)
                target.copy_(value)
    except KeyError as e:
        raise UserError(f"{path} does not fit this model: it has no {e.args[0]}") from None
    except (ValueError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError) as e:
        raise UserError(f"{path} does not fit this model: {reason(e)}") from None


def plain_state(checkpoint):
    """Return the model's state dict without the name prefixes of torch.compile and DDP."""
    state = checkpoint["model"].items()
    return {re.sub(r"^((_orig_mod|module)\.)+", "", name): tensor for name, tensor in state}


def load_model(checkpoint, path):
    """Return the Transformer of a checkpoint that was loaded from `path`, on the CPU."""
    try:
        args = ModelArgs.from_dict(checkpoint["model_args"])
        check_size(args, checkpoint, path)
        model = Transformer(args)
        if "model" in checkpoint:
            model.load_state_dict(plain_state(checkpoint))
    except (ValueError, TypeError, RuntimeError, AttributeError) as e:
        cause = str(e).splitlines()[:2][-1].strip()  # torch's second line names the tensors
        raise UserError(f"{path} does not fit this model: {cause[:300]}") from None
    if "model" not in checkpoint:
        restore(model, None, checkpoint, path)
    return model
