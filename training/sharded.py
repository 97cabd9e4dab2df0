"""
Read and write sharded tensors in a folder: torch.distributed.checkpoint, made safe.

Import this only when needed: it takes a second to load.
"""

import io
import os
import pickle
import pickletools
import warnings

import torch.distributed.checkpoint as dcp

from system.files import check_file
from training import torchfile

MAX_CONTENTS_BYTES = 16 << 20  # each tensor takes about 500
CONTENTS = {  # the globals allowed in a table of contents, which is a pickle
    "torch": {"Size", "float32", "float16", "bfloat16", "int64"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}


class ContentsUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in CONTENTS.get(module, ()):
            raise pickle.UnpicklingError("it holds more than tensors")
        return super().find_class(module, name)


class TensorReader(dcp.FileSystemReader):
    """Reads only tensors, so that a stranger's folder cannot run code."""

    def __init__(self, folder):
        super().__init__(folder)
        contents = os.path.join(folder, ".metadata")
        check_file(contents)
        with open(contents, "rb") as f:
            data = f.read(MAX_CONTENTS_BYTES)
        check_memo(data)
        self.contents = ContentsUnpickler(io.BytesIO(data)).load()
        kinds = {type(entry) for entry in self.contents.state_dict_metadata.values()}
        if kinds - {dcp.metadata.TensorStorageMetadata}:  # dcp would unpickle others unchecked
            raise pickle.UnpicklingError("it holds more than tensors")
        names = {place.relative_path for place in self.contents.storage_data.values()}
        if any(os.path.basename(name) != name for name in names):
            raise pickle.UnpicklingError("it points to files outside its folder")
        for name in names:
            check_file(os.path.join(folder, name))
        self.contents.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)

    def read_metadata(self, *args, **kwargs):
        return self.contents

    def _slice_file(self, file, place):  # the bytes of one tensor, which torch.load reads next
        part = io.BytesIO(super()._slice_file(file, place).read())  # dcp's view seeks incorrectly
        torchfile.check_archive(part)
        return part


def check_memo(data):
    """Raise UnpicklingError for a memo longer than the pickle: Python would allocate it."""
    for op, place, _ in pickletools.genops(data):
        if op.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(place) > len(data):
            raise pickle.UnpicklingError("its pickle declares a memo larger than the file")


def write(folder, tensors):
    """Write {name: tensor} to an empty folder; every rank calls this and writes its part."""
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder, sync_files=True))
    except dcp.api.CheckpointException as e:
        raise first_failure(e) from None


def read(folder, tensors, optional):
    """
    Fill {name: tensor} from a folder written by any number of processes. Tensors with a name ending
    in `optional` are left unchanged if the folder lacks them. Raises KeyError, ValueError or
    RuntimeError if the folder does not fit, pickle.UnpicklingError if it could run code.
    """
    reader = TensorReader(folder)
    stored = reader.contents.state_dict_metadata
    tensors = {k: t for k, t in tensors.items() if k in stored or not k.endswith(optional)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about reading with a single process
            dcp.load(tensors, storage_reader=reader)
    except dcp.api.CheckpointException as e:
        raise first_failure(e) from None


def first_failure(error):
    return next(iter(error.failures.values()))[0]
