"""Reads the optimizer state of a checkpoint without running code from its files.

torch.distributed.checkpoint and DeepSpeed keep pickles, which may name any function and have it called. Here a pickle
may name only what describes tensors. What remains: a wrong file can still give wrong numbers.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_METADATA = "ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata "
_METADATA += "_MEM_FORMAT_ENCODING"  # not BytesStorageMetadata: such entries would be unpickled without limits
NAMES = {("torch.distributed.checkpoint.metadata", name) for name in _METADATA.split()} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in NAMES and not is_dtype:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which may be code")
        return super().find_class(module, name)


class TensorReader(FileSystemReader):
    """Reads a torch.distributed.checkpoint of tensors. `read_metadata` raises UnpicklingError for anything else."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        with open(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it describes no tensors")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def unreadable(folder: Path) -> str | None:
    """What is wrong with the description of an optimizer's tensors; None if nothing is, or if DeepSpeed wrote it."""
    if not (folder / ".metadata").is_file():
        return None
    try:
        TensorReader(folder).read_metadata()
    except Exception as error:  # pickle raises any type for a damaged file
        return str(error) or repr(error)
    return None


@contextmanager
def tensors_only() -> Iterator[None]:
    """Every torch.load in this context reads only tensors and DeepSpeed's settings, or raises UnpicklingError."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
