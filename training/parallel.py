"""
Training with several processes: how they share a model and a step, and how they agree.

    torchrun --nproc_per_node=4 train.py --fsdp --key=value ...

Without torchrun there is one process, and the functions here do next to nothing. Each process
("rank") computes a part of every step. With DDP, each holds the whole model and gradients are
averaged; with FSDP2, each holds a part of every matrix and gathers the rest when needed. Only
rank 0 prints and writes files, except for FSDP's sharded checkpoints.
"""

import atexit
import contextlib
import os
import re
import signal
import stat
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError
from system.hardware import pick_device
from system.progress import print_line

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # rank on this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
FIRST = RANK == 0
CONNECTION_LOST = re.compile("gloo|Connection (closed|reset)|Broken pipe|NCCL", re.IGNORECASE)
CHECKPOINT_THREAD = "checkpoint"  # name of the threads that a failing process waits for
GRACE_S = 2  # seconds for the first rank on a machine to print an error that all ranks share


def install_error_hook():
    """Prefix errors with their rank, and print an error shared by a machine's ranks only once."""
    if WORLD_SIZE == 1:
        return
    print_error = sys.excepthook

    def hook(kind, error, traceback):
        if issubclass(kind, UserError):
            if LOCAL_RANK:
                time.sleep(GRACE_S)  # torchrun ends this process after the first rank has ended
        elif issubclass(kind, dist.DistError) or CONNECTION_LOST.search(str(error)):
            time.sleep(GRACE_S)
            kind = UserError
            error = UserError(
                f"another process has ended ({str(error).partition(chr(10))[0]}): see its error "
                f"above, if any; use --init_from=resume to continue from the latest checkpoint"
            )
        sys.stderr = sys.__stderr__  # torch has replaced it with a buffer
        print(f"[rank{RANK}]: ", end="", file=sys.stderr)
        print_error(kind, error, traceback)
        for thread in threading.enumerate():
            if thread.name == CHECKPOINT_THREAD:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a normal exit would wait for ranks that wait for this one

    sys.excepthook = hook


def start(device):
    """
    Join the processes that torchrun started and return this one's torch device. With "auto" or
    "cuda", each rank uses the GPU with its local rank.
    """
    if WORLD_SIZE > 1 and device.startswith(("cuda:", "mps")):
        raise UserError(f"device = {device}: expected one of auto, cuda, cpu under torchrun")
    if WORLD_SIZE > 1 and device == "auto" and not torch.cuda.is_available():
        device = "cpu"
    if WORLD_SIZE > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        if torch.cuda.device_count() <= LOCAL_RANK:
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs, but at least {LOCAL_RANK + 1} "
                f"processes: use torchrun --nproc_per_node={torch.cuda.device_count()}"
            )
        device = f"cuda:{LOCAL_RANK}"
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        # gloo beside NCCL, to exchange flags without waiting for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(exit_together)
    return device


def exit_together():
    """
    End this process once all ranks get here. A normal interpreter exit races with gloo's threads:
    on a busy machine it occasionally aborts, and torchrun then fails the whole job.
    """
    with contextlib.suppress(RuntimeError):  # a rank that failed has printed its error
        wait_for_all()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def share_of_step(batch_size, micro_batches):
    """
    Divide a step of `micro_batches` times batch_size sequences among the ranks. Return (sequences
    per micro-batch, micro-batches per rank). A step always has the same sequences.
    """
    total = batch_size * micro_batches
    if total % WORLD_SIZE:
        raise UserError(
            f"a step of {total} sequences cannot be shared by {WORLD_SIZE} processes: make "
            f"batch_size * gradient_accumulation_steps a multiple of {WORLD_SIZE}"
        )
    mine = total // WORLD_SIZE
    n = -(-mine // batch_size)
    while mine % n:
        n += 1
    return mine // n, n


def largest_that_fits(size, n, fits):
    """
    Return (sequences per micro-batch, micro-batches per rank) with the product size * n and the
    largest micro-batch, up to `size`, for which fits(sequences) is true in all ranks. Return None
    if not even one sequence fits.
    """
    total = size * n
    while any_rank(not fits(size)):
        n = next((k for k in range(n + 1, total + 1) if total % k == 0), None)
        if n is None:
            return None
        size = total // n
    return size, n


def shard(model, device):
    """Shard the parameters of a Transformer over the ranks, in place (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (WORLD_SIZE,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model, device):
    """Return a module to call instead of `model` that averages gradients over the ranks (DDP)."""
    if WORLD_SIZE == 1:
        return model
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        forward_sync_buffers=False,  # the RoPE tables never change
        gradient_as_bucket_view=True,
    )


def sync_gradients(net, enabled):
    """Set whether the next backward pass averages gradients; only a step's last one must."""
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = enabled
    elif hasattr(net, "set_requires_gradient_sync"):  # FSDP2
        net.set_requires_gradient_sync(enabled)


def total(*values):
    """Return the sum of each value over the ranks, computed in float64."""
    if WORLD_SIZE == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def shares(weights):
    """
    Return the factors with which the mean losses of this rank's micro-batches add up to that of the
    step, after gradients are averaged over the ranks. weights: of the targets of each micro-batch.
    """
    everything = max(total(sum(weights))[0], 1.0)
    return [weight * WORLD_SIZE / everything for weight in weights]


def from_first(value):
    """Return the first rank's value in all ranks."""
    if WORLD_SIZE == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def any_rank(flag):
    """Return whether the flag is set in any rank."""
    return total(float(flag))[0] > 0


def full_tensor(tensor):
    """Return a tensor that may be sharded as a whole one; all ranks must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wait_for_all():
    total(0.0)


def say(text):
    """Print from the first rank only."""
    if FIRST:
        print(text, flush=WORLD_SIZE > 1)


class StopRequest:
    """
    Records whether to stop. The first Ctrl-C, SIGTERM or SIGHUP requests a stop after the current
    step. A second one ends the process immediately, except under torchrun: it forwards signals that
    the processes may have received already.
    """

    def __init__(self):
        self.requested = False
        self.replaced = {}  # {signal: its previous handler}

    def listen(self):
        """Install the handlers; a signal that this process ignores (nohup) stays ignored."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signum = getattr(signal, name, None)  # Windows has no SIGHUP
            if signum and signal.getsignal(signum) is not signal.SIG_IGN:
                self.replaced[signum] = signal.signal(signum, self.handle)

    def restore(self):
        """Restore the handlers from before listen()."""
        for signum, handler in self.replaced.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        is_first, self.requested = not self.requested, True
        if signum == getattr(signal, "SIGHUP", None):
            leave_terminal()
        if is_first and FIRST:
            hint = "; repeat to stop immediately, without a checkpoint" if WORLD_SIZE == 1 else ""
            with contextlib.suppress(RuntimeError):  # the signal interrupted another print
                print_line(f"stopping after this step{hint}")
        elif not is_first and WORLD_SIZE == 1:
            self.restore()
            os.kill(os.getpid(), signum)

    def in_any_rank(self):
        return any_rank(self.requested)


def leave_terminal():
    """Discard output that does not go to a file: writing to a closed terminal would fail."""
    for fd in (1, 2):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def micro_batch(batches, first, size, n, device, k):
    """
    Return this rank's k-th micro-batch after sequence `first` of a TrainBatches: inputs and targets
    (size, T). A step has n micro-batches per rank.
    """
    step, i = divmod(k, n)
    position = first + (step * n + i) * size * WORLD_SIZE + RANK
    x, y = batches.at(position, size, stride=WORLD_SIZE)
    if device.type == "cuda":  # pinned memory is copied while the GPU computes
        torch.cuda.set_device(device)  # this is a new thread; its default is the first GPU
        x, y = x.pin_memory(), y.pin_memory()
    return x, y
