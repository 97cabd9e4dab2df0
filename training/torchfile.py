"""
Read torch.save files from strangers without running code, and without using more memory than the
size of the file.

torch.load(weights_only=True) runs no code, but it decompresses, and a pickle of a few bytes can
take gigabytes, hours, or overflow the stack. torch.save writes nothing of that kind, so everything
else is refused before torch reads it.
"""

import io
import os
import pickle
import pickletools
import zipfile

import torch

from system.files import check_file, check_not_pointer

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_PICKLE_BYTES = 16 << 20  # each tensor takes about 200
MAX_TUPLE_DEPTH = 8  # Python hashes tuples recursively
N_LEGACY_PICKLES = 5  # the format before PyTorch 1.6: magic, version, machine, values, keys

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
    """Return whether a value is a tensor of floats with all of its elements in memory."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type != "meta"
        and value.dtype in FLOATS
        and value.numel() * value.itemsize <= value.untyped_storage().nbytes()
    )


def is_state(value):
    """Return whether a value is {name: tensor}."""
    return isinstance(value, dict) and all(
        type(name) is str and is_tensor(tensor) for name, tensor in value.items()
    )


def load(path, device="cpu", mmap=False, legacy=False):
    """
    Load a torch.save file and verify its checksums, which torch does not do. mmap: read data when
    it is used; legacy: also accept the format before PyTorch 1.6, which has no checksums. Raises
    UserError if it is not a regular file, UnpicklingError for values that torch.save would not
    write for a checkpoint, and other errors if it is damaged.
    """
    check_file(path)
    check_not_pointer(path)
    is_zip = zipfile.is_zipfile(path)  # the legacy format is not a zip and cannot be mapped
    with open(path, "rb") as f:
        if is_zip or not legacy:
            check_archive(f)
        else:
            check_pickles(f.read(MAX_PICKLE_BYTES), N_LEGACY_PICKLES)
    return torch.load(path, map_location=device, weights_only=True, mmap=mmap and is_zip)


def check_archive(f):
    """
    Raise unless an open archive is like torch.save's: no entry is compressed, the entries are not
    longer than the file, and their checksums are right.
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
                if entry.file_size > MAX_PICKLE_BYTES:
                    raise zipfile.BadZipFile("its pickle is too long")
                check_pickles(archive.read(entry))
        if archive.testzip():
            raise zipfile.BadZipFile("a checksum is wrong")
    f.seek(0)


def check_pickles(data, n=1):
    """Raise unless data starts with n pickles that torch.save could have written."""
    stream = io.BytesIO(data)
    for _ in range(n):
        check_pickle(stream)


def check_pickle(stream):
    """
    Check one pickle without building its values. On the simulated stack, a value is the name of a
    global, the depth of a tuple, or None. Only filling containers and calling CALLS is allowed.
    """
    stack, memo = [], {}
    for op, argument, _ in pickletools.genops(stream):
        if op.name not in OPCODES or (op.name == "GLOBAL" and not is_known(argument)):
            raise Suspicious(f"{op.name} {argument}")
        if op.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
            continue
        before, after = list(op.stack_before), op.stack_after
        popped = []
        if pickletools.stackslice in before:  # everything after the latest mark
            at = len(stack) - 1 - stack[::-1].index(MARK)
            popped, stack[at:] = stack[at + 1 :], []
            before = before[: before.index(pickletools.markobject)]
        if before:
            popped, stack[-len(before) :] = stack[-len(before) :] + popped, []
        if op.name == "REDUCE":
            function, arguments = popped
            # copying a long dict every few bytes would take hours
            if function not in CALLS or (function == DICT and arguments != 0):
                raise Suspicious(f"a call of {function}")
        value = None
        if "TUPLE" in op.name:
            value = 1 + max((t for t in popped if type(t) is int), default=0) if popped else 0
            if value > MAX_TUPLE_DEPTH:
                raise Suspicious("nested tuples")
        elif op.name == "GLOBAL":
            value = argument
        elif op.name == "MARK":
            value = MARK
        elif "GET" in op.name:
            value = memo[argument]
        stack += [value] * len(after)


def is_known(name):
    """Return whether a global, "module name", is a storage, a dtype, or one of CALLS."""
    module, _, attribute = name.partition(" ")
    is_dtype = module == "torch" and isinstance(getattr(torch, attribute, 0), torch.dtype)
    return name in NAMES or is_dtype
