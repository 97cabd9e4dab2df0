"""
Checkpoints: all that a run needs to go on as if it had never stopped.

In out_dir, ckpt.pt is the latest checkpoint, ckpt_000200.pt one from an earlier step, and best.pt
that of the lowest validation loss. Each is a dict of plain values and tensors:

    model            state dict of the Transformer
    model_args       ModelArgs as a dict
    optimizer        {"<parameter>.<name>": tensor}, the optimizer's memory
    iter_num         steps done
    n_sequences      training sequences seen: the loader's position
    n_windows        sequences of an epoch
    evaluated        step of the last evaluation
    train_s          seconds of training so far
    best_val_loss    lowest validation loss so far, nats a token
    scaler           state of the gradient scaler of float16, empty without
    tokenizer_hash   of the tokenizer model, "" where it is unknown
    config           the settings of train.py
    data_path        data_dir seen from out_dir, to find it again from another folder
    compute_dtype    of the matrix products
    versions         of Python and the packages
    format           FORMAT

A file is written beside its place and renamed, so it is whole or absent; it is loaded with
weights_only, so that one from a stranger cannot run code, and its checksums are compared, which
torch.load does not do. llama2.c's checkpoints have the same names for model, model_args and
iter_num, and load for export, sampling and fine-tuning.

Under FSDP a checkpoint is a folder of the same name: the tensors as torch.distributed.checkpoint
writes them, each process its part, and run.pt with everything else.
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
from optim import part_for, warmup_steps
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
MAY_BE_NEW = ".neuron_sizes"  # memory that begins at 0 where the run so far had none
LATEST, BEST = "ckpt.pt", "best.pt"
RUN_FILE = "run.pt"  # of a sharded checkpoint
SCALER = "scale growth_factor backoff_factor growth_interval _growth_tracker".split()


# what the fields may hold, see fields.fits: where they are present, in every checkpoint
FIELDS = {
    "model": torchfile.is_state,
    "model_args": each(is_scalar),
    "config": is_config,
    "tokenizer_hash": is_text,
    "files": lambda value: type(value) is dict,
    **dict.fromkeys("format iter_num n_sequences n_windows evaluated".split(), is_count),
    "train_s": is_size,
}
# and what a run that can be resumed has as well; llama2.c's are of other types
OF_RUN = {
    **{name: FIELDS[name] for name in FIELDS if name not in ("model", "files")},
    "config": lambda value: is_config(value) and fits(value, {"data_dir": is_string}),
    "best_val_loss": lambda value: type(value) is float and value >= 0,  # infinite at first
    "scaler": lambda value: value == {} or fits(value, dict.fromkeys(SCALER, is_size)),
    "versions": lambda value: fits(value, dict.fromkeys(versions(), is_text)),
    "compute_dtype": lambda value: value in DTYPES,
}
# absent from sharded checkpoints, or from those of earlier programs
OPTIONAL = {"optimizer": torchfile.is_state, "data_path": is_string}
DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")


@dataclass
class RunState:
    """What a run has reached; each field is an entry of its checkpoints."""

    iter_num: int = 0  # steps done
    n_sequences: int = 0  # training sequences seen: the loader's position
    evaluated: int = 0  # step of the last evaluation
    train_s: float = 0.0  # seconds of training: no start-up, compilation, evaluation or saving
    best_val_loss: float = math.inf  # lowest validation loss so far, nats a token

    @classmethod
    def of(cls, checkpoint):
        return cls(**{name: checkpoint[name] for name in cls.__dataclass_fields__})

    def seconds(self, since):
        """Seconds of training, as the first rank sees them; since: time of the last log line."""
        now = self.train_s + (time.perf_counter() - since if since else 0.0)
        return parallel.total(now if parallel.FIRST else 0.0)[0]

    def is_done(self, settings, since=None):
        """Whether the last step is done."""
        if settings.max_minutes:
            return self.seconds(since) >= 60 * settings.max_minutes
        return self.iter_num >= settings.max_iters

    def part_done(self, settings, since):
        """How much is done, 0 to 1, of the minutes or of the steps after the warm-up."""
        if settings.max_minutes:
            return self.seconds(since) / (60 * settings.max_minutes)
        warmup = warmup_steps(settings)
        return (self.iter_num - warmup) / (settings.max_iters - warmup)


class Damaged(UserError):
    """A checkpoint that was changed or never was one; another may be whole."""


# ---- what is saved


def versions():
    return {
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "torch": torch.__version__.partition("+")[0],
    }


def optimizer_tensors(model, optimizer):
    """{"<parameter>.<name>": tensor} of an optimizer's memory; not copies, so writing sets it."""
    if not optimizer.state:
        allocate(optimizer)
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}.{key}": tensor
        for p, memory in optimizer.state.items()
        for key, tensor in memory.items()
    }


def allocate(optimizer):
    """Have an optimizer make its memory, which it does in a step: one that changes no parameter."""
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
    """All tensors of a run under one name each, for a sharded checkpoint."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    memory = optimizer_tensors(model, optimizer) if optimizer else {}
    return tensors | {f"optimizer.{name}": t for name, t in memory.items()}


class Snapshot:
    """
    Copies of a run's tensors in main memory, into the same buffers each time: fresh memory would
    take longer than the copy.
    """

    def __init__(self):
        self.buffers = {}

    def take(self, value):
        """A nested dict with every tensor copied; tied tensors stay tied."""
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
    Writes the checkpoints of one run to `folder`, in the background: training goes on as soon as
    the tensors are copied. The latest keep_last are kept, and the best. A failure, a full disk for
    example, costs nothing but this checkpoint: it is said, kept as `error`, and the next save tries
    again; best_failed says, until it is set to False, that it was the best that is not there.
    latest_step is the step of the ckpt.pt that is there, None without one. `installed`, where it is
    set, is called with the path and the step of each that is new.
    """

    def __init__(self, folder, keep_last, latest_step=None, installed=None):
        self.folder, self.keep_last, self.latest_step = folder, keep_last, latest_step
        self.installed = installed
        self.latest = os.path.join(folder, LATEST)
        self.snapshot, self.thread = Snapshot(), None
        self.error, self.best_failed = None, False

    def save(self, checkpoint, is_best=False):
        """Begin to save; waits first for an earlier save that is not done yet."""
        self.wait()
        with self.reporting(is_best):
            copy = self.snapshot.take(checkpoint)
            self.thread = threading.Thread(
                target=self.write, args=(copy, is_best), name=parallel.WAITED_FOR
            )
            self.thread.start()

    def lost_best(self):
        """Whether the best model could not be written in some rank; says so once."""
        lost = parallel.any_rank(self.best_failed)
        self.best_failed = False
        return lost

    def wait(self):
        """Return when nothing is being written any more."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def write(self, checkpoint, is_best):
        part, self.error = f"{self.latest}.{os.getpid()}.part", None
        with self.reporting(is_best, part):
            save_file(part, checkpoint)
            self.install(part, checkpoint["iter_num"], is_best)

    def save_sharded(self, checkpoint, model, optimizer, is_best=False):
        """
        The same for parameters that are spread over the ranks; all of them call this, and it
        returns when everything is written.
        """
        part, step = f"{self.latest}.sharded.part", checkpoint["iter_num"]

        def begin():
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
        for job in (begin, write_tensors, finish):
            with self.reporting(is_best, part):
                job()
            if parallel.any_rank(self.error is not None):
                self.error = self.error or "another rank cannot write its part of the checkpoint"
                return
        self.latest_step = step

    @contextlib.contextmanager
    def reporting(self, is_best, part=None):
        try:
            yield
        except Exception as e:  # torch reports a full disk as a RuntimeError, dcp in one of its own
            if part:
                remove(part)
            self.best_failed = self.best_failed or is_best
            self.error = f"cannot write {self.latest}: {reason(e)}"
            kept = f"; that of step {self.latest_step} is untouched" if self.latest_step else ""
            advice = "the next save tries again: make room meanwhile"
            print_line(f"warning: {self.error}{kept}; {advice}", sys.stderr)

    def install(self, part, step, is_best):
        """Make `part` the latest checkpoint; the one before gets its step into its name."""
        if is_best:  # first: a run killed in between comes here again, and not if it were last
            best = os.path.join(self.folder, BEST)
            link_or_copy(part, f"{best}.part")
            replace(f"{best}.part", best)
        if os.path.exists(self.latest) and self.latest_step is not None:
            older = os.path.join(self.folder, numbered(self.latest_step))
            remove(older)
            link_or_move(self.latest, older)
        replace(part, self.latest)
        self.latest_step = step
        flush_folder(self.folder)
        if self.installed:
            self.installed(self.latest, step)
        for path in numbered_in(self.folder)[self.keep_last - 1 :]:
            remove(path)


def save_file(path, value):
    """torch.save to `path` and from there to the disk; UserError says what keeps it from that."""
    try:
        with atomic_write(path) as f:
            torch.save(value, f)
    except (OSError, RuntimeError) as e:
        raise UserError(reason(e)) from None


def reason(error):
    """Why writing failed, in a few words."""
    while error.__cause__ or error.__context__:  # torch wraps what the system said
        error = error.__cause__ or error.__context__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def link_or_move(path, target):
    """Give a file its second name; where that is impossible (folders), its only one."""
    try:
        os.link(path, target)
    except OSError:
        os.replace(path, target)


def numbered(step):
    return f"ckpt_{step:06}.pt"


def numbered_in(folder):
    """Paths of the earlier checkpoints of a folder, the latest first."""
    found = glob.glob(os.path.join(glob.escape(folder), "ckpt_*.pt"))
    return sorted(filter(step_of, found), key=step_of, reverse=True)


def step_of(path):
    """The step in an earlier checkpoint's name; 0 where it is none."""
    match = re.fullmatch(r"ckpt_(\d+)\.pt", os.path.basename(path))
    return int(match[1]) if match else 0


# ---- reading


def load_checkpoint(path, device="cpu"):
    """
    Read a checkpoint; of a sharded one all but its tensors. Raises UserError, in one sentence, for
    one that is damaged or none at all; it offers the one before where there is one.
    """
    try:
        return load_whole(path, device)
    except UserError as e:
        older = numbered_in(os.path.dirname(path))
        is_newest = os.path.basename(path) in (LATEST, BEST)
        offer = f"; an earlier one is {older[0]}" if older and is_newest else ""
        raise UserError(f"{e}{offer}") from None


def load_whole(path, device="cpu"):
    """load_checkpoint without the offer."""
    if os.path.isdir(path):
        file = os.path.join(path, RUN_FILE)
        if not os.path.exists(file) and os.path.exists(os.path.join(path, LATEST)):
            best = next(n for n in (BEST, LATEST) if os.path.exists(os.path.join(path, n)))
            raise UserError(f"{path} is the folder of a run: name {os.path.join(path, best)}")
        if os.path.exists(os.path.join(path, "config.json")):
            raise UserError(
                f"{path} is a Hugging Face folder: make a checkpoint of it first, with "
                f"python export.py imported/ckpt.pt --from-hf={path}"
            )
        if not os.path.exists(file):
            raise Damaged(f"{path} is a folder, and no sharded checkpoint: it has no {RUN_FILE}")
        checkpoint, needed = load_file(file, device), ("files", "model_args")
    else:
        checkpoint, needed = load_file(path, device), ("model", "model_args")
    if not isinstance(checkpoint, dict) or any(name not in checkpoint for name in needed):
        raise Damaged(f"{path} is no checkpoint: it has no {' and '.join(needed)}")
    check_fields(checkpoint, path)
    for name, expected in checkpoint.get("files", {}).items() if os.path.isdir(path) else ():
        name = os.path.join(path, os.path.basename(str(name)))
        if not os.path.isfile(name) or checksum(name) != expected:
            raise Damaged(f"{path} is damaged: {name} is not as it was written")
    return checkpoint


def check_fields(checkpoint, path):
    """Raise UserError for a field that no run would have saved."""
    fields = FIELDS
    if is_count(checkpoint.get("format")) and checkpoint["format"] == FORMAT:
        fields = FIELDS | OPTIONAL | {n: OF_RUN[n] for n in OF_RUN if n in checkpoint}
    for name, check in fields.items():
        if name in checkpoint and not check(checkpoint[name]):
            raise Damaged(
                f"{path} is no checkpoint of this program: its {name} is not what a run saves"
            )
    try:
        ModelArgs.from_dict(checkpoint["model_args"])
    except ValueError as e:
        raise UserError(f"{path} does not fit this program: {e}") from None
    if checkpoint.get("evaluated", 0) > checkpoint.get("iter_num", math.inf):
        raise Damaged(f"{path} is no checkpoint of this program: evaluated is after iter_num")


def check_size(args, checkpoint, path):
    """
    Raise UserError where a model of ModelArgs has more numbers than the checkpoint from `path` can
    hold, before memory is taken for them.
    """
    if "model" in checkpoint:
        storages = [tensor.untyped_storage() for tensor in checkpoint["model"].values()]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}.values()
    else:
        sizes = [os.path.getsize(os.path.join(path, name)) for name in os.listdir(path)]
    most = sum(sizes) // 2  # a number takes two bytes at least
    n_params = 2 * args.n_layers * args.dim**2  # of wq and wo
    if n_params <= most:
        with torch.device("meta"):
            n_params = Transformer(args).n_params()
    if n_params > most:
        raise UserError(
            f"{path} does not fit this model, which has {n_params:,} numbers or more: it is "
            f"too short"
        )


def load_file(path, device):
    if not os.path.exists(path):
        earlier = os.path.join(os.path.dirname(path), "previous")
        also = f"; the run before it is in {earlier}" if os.path.isdir(earlier) else ""
        raise UserError(f"checkpoint {path} does not exist; train one with: python train.py{also}")
    try:
        return torchfile.load(path, device)
    except UserError:
        raise
    except OSError as e:  # the file may be whole, and readable another time
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except pickle.UnpicklingError:
        raise Damaged(
            f"{path} holds more than numbers and was not loaded, since that could run code or "
            f"exhaust the memory"
        ) from None
    except Exception as e:  # what foreign bytes lead to is open-ended
        if isinstance(e, MemoryError) or "allocate" in str(e):
            raise UserError(f"there is not enough memory to read {path}") from None
        raise Damaged(f"{path} is damaged or no checkpoint of this program") from None


def has_checkpoint(folder):
    """Whether a run's folder has any checkpoint, damaged or whole."""
    return any(os.path.exists(os.path.join(folder, n)) for n in (LATEST, BEST)) or bool(
        numbered_in(folder)
    )


def load_latest(folder):
    """
    The latest checkpoint of a run that can be resumed, as (checkpoint, path, damaged): where
    ckpt.pt is damaged, the latest of those that are not, with a printed line, and the paths of
    those that are. (None, None, []) where there is none at all. Raises UserError where all are
    damaged, or one cannot be read, which says nothing of what is in it.
    """
    latest, best = os.path.join(folder, LATEST), os.path.join(folder, BEST)
    paths = [path for path in (latest, best, *numbered_in(folder)) if os.path.exists(path)]
    whole, damaged, why = [], [], f"{latest} does not exist"
    for path in paths:
        try:
            whole.append((load_whole(path), path))
        except Damaged as e:
            why = str(e) if not damaged else f"{why}; so is {path}"
            damaged.append(path)
        if whole and path != best:  # of the numbered ones the first is the latest
            break
    if damaged and not whole:
        raise UserError(
            f"{why}; no other checkpoint in {folder} is whole: to begin anew give another --out_dir"
        )
    if not whole:
        return None, None, []
    checkpoint, path = max(whole, key=lambda one: one[0].get("iter_num", 0))
    if OF_RUN.keys() - checkpoint.keys():
        raise UserError(
            f"{path} holds weights but no run that can be resumed; to train on from the "
            f"weights: --init_from={path} and another --out_dir"
        )
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path} is of another version of this program and cannot be resumed")
    if path != latest:
        parallel.say(f"{why}; going on from {path}, step {checkpoint['iter_num']}")
    return checkpoint, path, damaged


def put_aside(folder, damaged, step):
    """
    Rename checkpoints that rotation would otherwise move or delete: damaged ones and, where a run
    resumes from an earlier step, those of later steps.
    """
    for path in damaged:
        replace(path, f"{path}.damaged")
        print(f"{path} is now called {path}.damaged")
    for path in numbered_in(folder):
        if step_of(path) > step:
            replace(path, f"{path}.later")
            print(f"{path} is of a later step and now called {path}.later")


def restore(model, optimizer, checkpoint, path):
    """
    Set a model's parameters, and an optimizer's memory unless it is None, from a checkpoint of any
    number of processes; `path` is where it came from.
    """
    try:
        targets = tensors_of(model, optimizer)
        if os.path.isdir(path):
            from training import sharded

            sharded.read(path, targets, MAY_BE_NEW)
            return
        source = {f"model.{name}": t for name, t in plain_state(checkpoint).items()}
        if optimizer:
            source |= {f"optimizer.{k}": t for k, t in checkpoint["optimizer"].items()}
        with torch.no_grad():
            for name, target in targets.items():
                if name not in source and name.endswith(MAY_BE_NEW):
                    continue
                value = source[name].to(target.device)
                if value.shape != target.shape:
                    raise ValueError(
                        f"{name} is {tuple(value.shape)}, expected {tuple(target.shape)}"
                    )
                if hasattr(target, "full_tensor"):  # spread over the ranks
                    value = part_for(target, value)
                target.copy_(value)
    except KeyError as e:
        raise UserError(f"{path} does not fit this model: it has no {e.args[0]}") from None
    except (ValueError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError) as e:
        raise UserError(f"{path} does not fit this model: {reason(e)}") from None


def plain_state(checkpoint):
    """The state dict of the model, without the prefixes of torch.compile and DDP."""
    state = checkpoint["model"].items()
    return {re.sub(r"^((_orig_mod|module)\.)+", "", name): tensor for name, tensor in state}


def load_model(checkpoint, path):
    """The Transformer of a loaded checkpoint, on the CPU; `path` is where it came from."""
    try:
        args = ModelArgs.from_dict(checkpoint["model_args"])
        check_size(args, checkpoint, path)
        model = Transformer(args)
        if "model" in checkpoint:
            model.load_state_dict(plain_state(checkpoint))
    except (ValueError, TypeError, RuntimeError, AttributeError) as e:
        cause = str(e).splitlines()[:2][-1].strip()  # torch names the tensors in its second line
        raise UserError(f"{path} does not fit this model: {cause[:300]}") from None
    if "model" not in checkpoint:
        restore(model, None, checkpoint, path)
    return model
