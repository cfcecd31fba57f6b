"""What torch.save wrote, as places in the file: its pickle is read as data, of the tensors' bytes only where they lie.

Such a file is a zip archive: `*/data.pkl` describes the objects, `*/data/0`, `*/data/1`, … hold the storages that its
tensors lie in, uncompressed. A tensor may be a part of a storage, and two tensors may share one.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ts_parallel.checkpoint.formats.model_names import find_model_names
from ts_parallel.checkpoint.formats.pickles import DataUnpickler, Names
from ts_parallel.checkpoint.stored import StoredTensor, stored_whole
from ts_parallel.errors import CheckpointError

_DEEPEST = 16  # dicts in dicts; more are no state that a trainer writes

_HEADER_MAGIC, _HEADER_BYTES = b"PK\x03\x04", 30  # of a record in a zip archive

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor where torch.save left it: `offset` is that of its first element, from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def is_row_major(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != step:
                return math.prod(self.shape) == 0
            step *= size
        return True


def read_torch_tensors(file: Path) -> Iterator[StoredTensor]:
    """The model's tensors of a file that torch.save wrote: a state dict, or one among a trainer's other state.

    Raises:
        CheckpointError: it is cut off or no such file, names something that is no tensor and no plain data, or holds a
            tensor that does not lie row by row.
    """
    with file.open("rb") as stream:
        content = read_torch_archive(stream, file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no dict of tensors")
    found = dict(_tensors_of_dict(content, (), file))
    paths = {".".join(path): path for path in found}
    if len(paths) < len(found):
        raise CheckpointError(f"{file} holds two tensors of one name")
    for key, name in find_model_names(paths, file).items():
        tensor = check_layout(found[paths[key]], name, file)
        yield stored_whole(name, file, tensor.dtype, tensor.shape, tensor.offset)


def check_layout(tensor: PickledTensor, name: str, file: Path) -> PickledTensor:
    """
    Raises:
        CheckpointError: the tensor does not lie row by row.
    """
    if not tensor.is_row_major():
        raise CheckpointError(
            f"{name!r} of shape {list(tensor.shape)} lies in {file} with strides {list(tensor.stride)}: "
            "call .contiguous() on it before saving"
        )
    return tensor


def read_torch_archive(stream: io.BufferedIOBase, file: Path, start: int = 0, length: int | None = None) -> Any:
    """The object that torch.save wrote at `start` of `stream`, `PickledTensor`s in it. No storage is read.

    Raises:
        CheckpointError: there is none, it is cut off, or its pickle names what is not plain data.
    """
    if length is None:
        length = stream.seek(0, io.SEEK_END) - start
    stream.seek(start)
    if stream.read(4) != _HEADER_MAGIC:
        raise CheckpointError(
            f"{file} is not in torch.save's zip format: load it with the torch that wrote it, and save it again by "
            "torch 1.6 or later, or as safetensors"
        )
    try:
        return _Archive(stream, file, start, length).load()
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{file} is cut off or damaged: {error}") from None


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, stream: io.BufferedIOBase, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._position = stream, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a seek to before the start")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        self._stream.seek(self._start + self._position)
        content = self._stream.read(left if size is None or size < 0 else min(size, left))
        self._position += len(content)
        return content


class _Archive:
    """One archive in a file. The stream is its opener's."""

    def __init__(self, stream: io.BufferedIOBase, file: Path, start: int, length: int) -> None:
        self._stream, self._file, self._start, self._end = stream, file, start, start + length
        with zipfile.ZipFile(_Window(stream, start, length)) as archive:
            self._records = {info.filename: info for info in archive.infolist()}
        self._folder = next((name for name in self._records if name.endswith("/data.pkl")), "").removesuffix("data.pkl")

    def load(self) -> Any:
        if not self._folder or f"{self._folder}constants.pkl" in self._records:
            raise CheckpointError(f"{self._file} is no state dict saved by torch.save")
        if f"{self._folder}byteorder" in self._records and self._read("byteorder") != b"little":
            raise CheckpointError(f"{self._file} was written on a big-endian machine")
        unpickler = DataUnpickler(self._read("data.pkl"), _NAMES, self._file)
        unpickler.persistent_load = self._find_storage  # type: ignore[method-assign]
        return unpickler.load()

    def _read(self, name: str) -> bytes:
        record = self._records[f"{self._folder}{name}"]
        self._stream.seek(self._find(record))
        content = self._stream.read(record.file_size)
        if zlib.crc32(content) != record.CRC:
            raise ValueError(f"record {record.filename} has another checksum")
        return content

    def _find(self, record: zipfile.ZipInfo) -> int:
        """Where its bytes begin in the file; `zipfile` tells only where its header does."""
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"record {record.filename} is compressed")
        self._stream.seek(self._start + record.header_offset)
        header = self._stream.read(_HEADER_BYTES)
        if header[:4] != _HEADER_MAGIC:
            raise ValueError(f"no record {record.filename} at {record.header_offset}")
        name_length, extra_length = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        return self._start + record.header_offset + _HEADER_BYTES + name_length + extra_length

    def _find_storage(self, saved: Any) -> _Storage:
        """The storage that the pickle calls `saved`."""
        _, dtype, key, _, num_elements = saved
        record = self._records[f"{self._folder}data/{key}"]
        num_bytes = num_elements * dtype.itemsize
        offset = self._find(record)
        if record.file_size != num_bytes or offset + num_bytes > self._end:
            raise ValueError(f"record {record.filename} has {record.file_size} bytes, not {num_bytes}")
        return _Storage(dtype, offset, num_bytes)


def _rebuild(
    storage: _Storage,
    first: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    *_: Any,
    dtype: torch.dtype | None = None,
) -> PickledTensor:
    dtype = dtype or storage.dtype
    shape, stride = tuple(shape), tuple(stride)
    if len(shape) != len(stride) or any(type(size) is not int or size < 0 for size in (first, *shape, *stride)):
        raise ValueError(f"a tensor of shape {shape} and strides {stride}")
    last = first + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) and (last + 1) * dtype.itemsize > storage.num_bytes:
        raise ValueError(f"a tensor of shape {shape} in a storage of {storage.num_bytes} bytes")
    return PickledTensor(dtype, shape, stride, storage.offset + first * dtype.itemsize)


def _rebuild_of_dtype(  # for dtypes that have no storage class of their own
    storage: _Storage,
    first: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: torch.dtype,
    *_: Any,
) -> PickledTensor:
    return _rebuild(storage, first, shape, stride, dtype=dtype)


def _rebuild_parameter(tensor: PickledTensor, *_: Any) -> PickledTensor:
    return tensor


_NAMES: Names = {
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch", "UntypedStorage"): torch.uint8,
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}


def _tensors_of_dict(
    content: dict[Any, Any], path: tuple[str, ...], file: Path
) -> Iterator[tuple[tuple[str, ...], PickledTensor]]:
    if len(path) > _DEEPEST:
        raise CheckpointError(f"{file} holds dicts in dicts, more than {_DEEPEST} deep")
    for key, value in content.items():
        if isinstance(value, PickledTensor):
            yield (*path, str(key)), value
        elif isinstance(value, dict):
            yield from _tensors_of_dict(value, (*path, str(key)), file)
