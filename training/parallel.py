"""
Many processes: what torchrun started, how they share a model and a step, and how they agree.

    torchrun --nproc_per_node=4 train.py --fsdp --key=value ...

Without torchrun there is one process, and every function here does nothing or next to nothing.
Each process ("rank") computes a part of every step. With DDP each holds the whole model and the
gradients are averaged; with FSDP2 each holds a part of every matrix and gathers the rest when it
is needed. Rank 0 alone prints and writes, but for the sharded checkpoints of FSDP.
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
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # among the processes of this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
FIRST = RANK == 0
LOST = re.compile("gloo|Connection (closed|reset)|Broken pipe|NCCL", re.IGNORECASE)
WAITED_FOR = "checkpoint"  # name of the threads that have to end before a process does
GRACE_S = 2  # in which the first rank of a machine may say what all of them have to say


def errors_of_ranks():
    """Errors name their rank, and an error common to all ranks of a machine is printed once."""
    if WORLD_SIZE == 1:
        return
    one_sentence = sys.excepthook

    def hook(kind, error, traceback):
        if issubclass(kind, UserError):
            if LOCAL_RANK:
                time.sleep(GRACE_S)  # torchrun ends this process once the first rank has ended
        elif issubclass(kind, dist.DistError) or LOST.search(str(error)):
            time.sleep(GRACE_S)
            kind = UserError
            error = UserError(
                "another process is gone; if it could say why, it did. The latest checkpoint is "
                f"whole: --init_from=resume goes on from there ({str(error).partition(chr(10))[0]})"
            )
        sys.stderr = sys.__stderr__  # torch has put a buffer in its place
        print(f"[rank{RANK}]: ", end="", file=sys.stderr)
        one_sentence(kind, error, traceback)
        for thread in threading.enumerate():
            if thread.name == WAITED_FOR:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the usual end would wait for ranks that wait for this one

    sys.excepthook = hook


def start(device):
    """
    Join the processes that torchrun started; returns the torch device of this one: of the name
    "auto" or "cuda" each rank takes the GPU with its local number.
    """
    if WORLD_SIZE > 1 and device.startswith(("cuda:", "mps")):
        raise UserError(f"device = {device!r}: expected auto, cuda or cpu for several processes")
    if WORLD_SIZE > 1 and device == "auto" and not torch.cuda.is_available():
        device = "cpu"
    if WORLD_SIZE > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        if torch.cuda.device_count() <= LOCAL_RANK:
            raise UserError(
                f"{LOCAL_RANK + 1} processes or more share {torch.cuda.device_count()} GPUs: "
                f"give torchrun --nproc_per_node={torch.cuda.device_count()}"
            )
        device = f"cuda:{LOCAL_RANK}"
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        # gloo beside NCCL: flags are agreed on without waiting for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave)
    return device


def leave():
    """
    End this process once all ranks have come here. The interpreter's own end races with gloo's
    threads: on a busy machine it aborts now and then, and with it the whole job.
    """
    with contextlib.suppress(RuntimeError):  # a rank that failed has said so
        wait_for_all()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def share_of_step(batch_size, micro_batches):
    """
    How a step of `micro_batches` of up to batch_size sequences is shared by the ranks: (sequences
    of a micro-batch, micro-batches of each rank). The step has the same sequences in any case.
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
    (sequences of a micro-batch, micro-batches of each rank) with the product of `size` and `n`: the
    largest first part up to `size` for which fits(sequences) is true in all ranks; None where not
    even one sequence fits.
    """
    total = size * n
    while any_rank(not fits(size)):
        n = next((k for k in range(n + 1, total + 1) if total % k == 0), None)
        if n is None:
            return None
        size = total // n
    return size, n


def shard(model, device):
    """Cut the parameters of a Transformer, in place, into a part for each rank (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (WORLD_SIZE,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model, device):
    """A module to call instead of `model`, which averages its gradients over the ranks (DDP)."""
    if WORLD_SIZE == 1:
        return model
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        forward_sync_buffers=False,  # the RoPE tables never change
        gradient_as_bucket_view=True,
    )


def sync_gradients(net, wanted):
    """Whether the next backward pass averages gradients; only a step's last one has to."""
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = wanted
    elif hasattr(net, "set_requires_gradient_sync"):  # FSDP2
        net.set_requires_gradient_sync(wanted)


def total(*numbers):
    """The sums of some numbers over the ranks, float64."""
    if WORLD_SIZE == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def from_first(value):
    """The first rank's value, in all of them."""
    if WORLD_SIZE == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def any_rank(flag):
    """Whether the flag is set in any rank."""
    return total(float(flag))[0] > 0


def whole(tensor):
    """A tensor of which each rank may hold a part, in full; all ranks have to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wait_for_all():
    total(0.0)


def say(text):
    if FIRST:
        print(text, flush=WORLD_SIZE > 1)


class StopRequest:
    """
    Whether this rank was told to stop. The first Ctrl-C, SIGTERM or SIGHUP asks for a stop after
    the current step. A second one ends the process at once, except under torchrun, which passes on
    to each process what the system may have sent it already.
    """

    def __init__(self):
        self.made = False
        self.replaced = {}  # {signal: its handler before}

    def listen(self):
        """A signal that this process was started to ignore stays ignored, as under nohup."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signum = getattr(signal, name, None)  # Windows has no SIGHUP
            if signum and signal.getsignal(signum) is not signal.SIG_IGN:
                self.replaced[signum] = signal.signal(signum, self.handle)

    def restore(self):
        """Have signals do what they did before listen()."""
        for signum, handler in self.replaced.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        is_first, self.made = not self.made, True
        if signum == getattr(signal, "SIGHUP", None):
            leave_terminal()
        if is_first and FIRST:
            more = "; once more ends at once, without a checkpoint" if WORLD_SIZE == 1 else ""
            with contextlib.suppress(RuntimeError):  # it came in the middle of another line
                print_line(f"stopping after this step{more}")
        elif not is_first and WORLD_SIZE == 1:
            self.restore()
            os.kill(os.getpid(), signum)

    def in_any_rank(self):
        return any_rank(self.made)


def leave_terminal():
    """Send output to nowhere unless it goes to a file: writing to a closed terminal would fail."""
    for fd in (1, 2):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def micro_batch(batches, first, size, n, device, k):
    """
    This rank's k-th micro-batch from sequence `first` on: inputs and targets (size, T) of a
    TrainBatches, where a step has n such micro-batches in each rank.
    """
    step, i = divmod(k, n)
    position = first + (step * n + i) * size * WORLD_SIZE + RANK
    x, y = batches.at(position, size, stride=WORLD_SIZE)
    if device.type == "cuda":  # pinned memory is copied while the GPU computes
        torch.cuda.set_device(device)  # of this thread, which would pin for the first GPU
        x, y = x.pin_memory(), y.pin_memory()
    return x, y
