"""
Files of torch.save from strangers, read without running code and without more memory than the
files are long.

torch.load(weights_only=True) runs no code, but it inflates, and a pickle of a few bytes can ask for
gigabytes, for hours, or for more stack than there is. What torch.save writes needs none of that, so
everything else is refused before torch reads it.
"""

import io
import os
import pickle
import pickletools
import zipfile

import torch

from system.files import check_file, check_not_pointer

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LONGEST_PICKLE = 16 << 20  # bytes; each tensor takes about 200
DEEPEST_TUPLE = 8  # Python hashes tuples recursively
N_LEGACY_PICKLES = 5  # of the format before PyTorch 1.6: magic, version, machine, values, keys

OPCODES = frozenset(
    "PROTO GLOBAL REDUCE BUILD MARK TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE EMPTY_LIST EMPTY_DICT "
    "APPEND APPENDS SETITEM SETITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT "
    "BINUNICODE SHORT_BINSTRING LONG1 BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT STOP".split()
)
DICT = "collections OrderedDict"
CALLS = frozenset(
    [DICT, *(f"torch._utils _rebuild_{what}" for what in ("tensor", "tensor_v2", "parameter"))]
)
MARK = object()
STORAGES = "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()
NAMES = CALLS | {f"torch {kind}Storage" for kind in STORAGES}


class Suspicious(pickle.UnpicklingError):
    """A pickle that torch.save does not write."""


def is_tensor(value):
    """Whether a value is a tensor of floats that has all of its numbers in memory."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type != "meta"
        and value.dtype in FLOATS
        and value.numel() * value.itemsize <= value.untyped_storage().nbytes()
    )


def is_state(value):
    """Whether a value is {name: tensor}."""
    return isinstance(value, dict) and all(
        type(name) is str and is_tensor(tensor) for name, tensor in value.items()
    )


def load(path, device="cpu", mmap=False, legacy=False):
    """
    What torch.save wrote to a file; the checksums in it are compared, which torch does not do.
    mmap: read numbers when they are used; legacy: take the format before PyTorch 1.6 as well, which
    has no checksums. Raises UserError for what is not a regular file, UnpicklingError for values
    that torch.save would not write for a checkpoint, and any other error for a damaged file.
    """
    check_file(path)
    check_not_pointer(path)
    is_zip = zipfile.is_zipfile(path)  # the legacy format is not, and cannot be mapped
    with open(path, "rb") as f:
        if is_zip or not legacy:
            check_archive(f)
        else:
            check_pickles(f.read(LONGEST_PICKLE), N_LEGACY_PICKLES)
    return torch.load(path, map_location=device, weights_only=True, mmap=mmap and is_zip)


def check_archive(f):
    """
    Raise unless an open archive is as torch.save writes it: no entry is compressed, all together
    are not longer than the file, and their checksums are right.
    """
    size = f.seek(0, os.SEEK_END)
    with zipfile.ZipFile(f) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("it is compressed")
        if sum(entry.file_size for entry in entries) > size:  # entries may overlap
            raise zipfile.BadZipFile("its entries are longer than the file")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                if entry.file_size > LONGEST_PICKLE:
                    raise zipfile.BadZipFile("its pickle is too long")
                check_pickles(archive.read(entry))
        if archive.testzip():
            raise zipfile.BadZipFile("a checksum is wrong")
    f.seek(0)


def check_pickles(data, n=1):
    """Raise unless data begins with n pickles that torch.save could have written."""
    stream = io.BytesIO(data)
    for _ in range(n):
        check_pickle(stream)


def check_pickle(stream):
    """
    Follow one pickle without making its values. On the stack a value is the name of a global, the
    depth of a tuple, or None. Containers may only be filled, and CALLS be called.
    """
    stack, memo = [], {}
    for op, argument, _ in pickletools.genops(stream):
        if op.name not in OPCODES or (op.name == "GLOBAL" and not is_known(argument)):
            raise Suspicious(f"{op.name} {argument}")
        if op.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
            continue
        before, after = list(op.stack_before), op.stack_after
        taken = []
        if pickletools.stackslice in before:  # everything after the latest mark
            at = len(stack) - 1 - stack[::-1].index(MARK)
            taken, stack[at:] = stack[at + 1 :], []
            before = before[: before.index(pickletools.markobject)]
        if before:
            taken, stack[-len(before) :] = stack[-len(before) :] + taken, []
        if op.name == "REDUCE":
            function, arguments = taken
            # a copy of a long dict for every few bytes would be endless
            if function not in CALLS or (function == DICT and arguments != 0):
                raise Suspicious(f"a call of {function}")
        value = None
        if "TUPLE" in op.name:
            value = 1 + max((t for t in taken if type(t) is int), default=0) if taken else 0
            if value > DEEPEST_TUPLE:
                raise Suspicious("nested tuples")
        elif op.name == "GLOBAL":
            value = argument
        elif op.name == "MARK":
            value = MARK
        elif "GET" in op.name:
            value = memo[argument]
        stack += [value] * len(after)


def is_known(name):
    """Whether a global, "module name", is a storage, a number format, or one of CALLS."""
    module, _, what = name.partition(" ")
    return name in NAMES or (module == "torch" and isinstance(getattr(torch, what, 0), torch.dtype))
