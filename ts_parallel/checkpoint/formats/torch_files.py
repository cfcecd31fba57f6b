"""What torch.save wrote, as places in the file: its pickle is read as data, of the tensors' bytes only where they lie.

Such a file is a zip archive: `*/data.pkl` describes the objects, `*/data/0`, `*/data/1`, … hold the storages that its
tensors lie in, uncompressed. Before torch 1.6 it was pickles one after the other, and the storages behind them
(`old_torch_files.py`).
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ts_parallel.checkpoint.formats.old_torch_files import is_old_torch_file, read_old_torch_file
from ts_parallel.checkpoint.formats.pickles import DataUnpickler, Names
from ts_parallel.checkpoint.formats.placeholders import refuse_placeholder
from ts_parallel.checkpoint.formats.torch_pickles import TORCH_NAMES, PickledTensor, Storage
from ts_parallel.checkpoint.stored import NameFinder, StoredTensor, stored_whole
from ts_parallel.errors import CheckpointError

_DEEPEST = 16  # dicts in dicts; more are no state that a trainer writes

_HEADER_MAGIC, _HEADER_BYTES = b"PK\x03\x04", 30  # of a record in a zip archive


def read_torch_tensors(files: Sequence[Path], find_names: NameFinder) -> Iterator[StoredTensor]:
    """The model's tensors, which `find_names` tells, of files that torch.save wrote: each a state dict or a part of
    one, or one among a trainer's other state.

    Raises:
        CheckpointError: one is cut off or no such file, names something that is no tensor and no plain data, or holds a
            tensor that does not lie row by row.
    """
    found: dict[str, tuple[Path, PickledTensor]] = {}
    paths: dict[str, tuple[str, ...]] = {}
    for file in files:
        own = leaves_of_dict(read_torch_dict(file), file, (PickledTensor,))
        if len({".".join(path) for path in own}) < len(own):
            raise CheckpointError(f"{file} holds two tensors of one name")
        for path, tensor in own.items():
            found[".".join(path)], paths[".".join(path)] = (file, tensor), path
    for key, name in find_names(paths, files[0] if len(files) == 1 else files[0].parent).items():
        file, tensor = found[key]
        check_layout(tensor, name, file)
        yield stored_whole(name, file, tensor.dtype, tensor.shape, tensor.offset)


def as_saved(paths: Mapping[str, tuple[str | int, ...]], source: Path) -> dict[str, str]:
    """Every tensor under the name that it was saved under, for `read_torch_tensors`."""
    return {key: key for key in paths}


def read_torch_dict(file: Path, names: Names = TORCH_NAMES) -> dict[Any, Any]:
    """
    Args:
        names: what its pickle may name beside plain data.

    Raises:
        CheckpointError: the file is cut off or none that torch.save wrote, or holds no dict.
    """
    refuse_placeholder(file)
    with file.open("rb") as stream:
        is_old = is_old_torch_file(stream)
        content = read_old_torch_file(stream, file) if is_old else read_torch_archive(stream, file, names=names)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no dict of tensors")
    return content


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


def read_torch_archive(
    stream: io.BufferedIOBase,
    file: Path,
    start: int = 0,
    length: int | None = None,
    names: Names = TORCH_NAMES,
) -> Any:
    """The object that torch.save wrote at `start` of `stream`, `PickledTensor`s in it. No storage is read.

    Raises:
        CheckpointError: there is none, it is cut off, or its pickle names what is not plain data.
    """
    if length is None:
        length = stream.seek(0, io.SEEK_END) - start
    stream.seek(start)
    if stream.read(4) != _HEADER_MAGIC:
        raise CheckpointError(
            f"{file} is not in torch.save's zip format, nor in its older one: load it with the torch that wrote it, "
            "and save it again as safetensors"
        )
    try:
        return _Archive(stream, file, start, length).load(names)
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

    def load(self, names: Names) -> Any:
        if not self._folder or f"{self._folder}constants.pkl" in self._records:
            raise CheckpointError(f"{self._file} is no state dict saved by torch.save")
        if f"{self._folder}byteorder" in self._records and self._read("byteorder") != b"little":
            raise CheckpointError(f"{self._file} was written on a big-endian machine")
        unpickler = DataUnpickler(self._read("data.pkl"), names, self._file)
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

    def _find_storage(self, saved: Any) -> Storage:
        """The storage that the pickle calls `saved`."""
        _, dtype, key, _, num_elements = saved
        record = self._records[f"{self._folder}data/{key}"]
        num_bytes = num_elements * dtype.itemsize
        offset = self._find(record)
        if record.file_size != num_bytes or offset + num_bytes > self._end:
            raise ValueError(f"record {record.filename} has {record.file_size} bytes, not {num_bytes}")
        return Storage(dtype, offset, num_bytes)


def leaves_of_dict(content: dict[Any, Any], file: Path, kinds: tuple[type, ...]) -> dict[tuple[str, ...], Any]:
    """What is one of `kinds`, by the keys of the dicts that it stands in.

    Raises:
        CheckpointError: the dicts are too many in each other.
    """
    return dict(_leaves(content, (), file, kinds))


def _leaves(
    content: dict[Any, Any], path: tuple[str, ...], file: Path, kinds: tuple[type, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    if len(path) > _DEEPEST:
        raise CheckpointError(f"{file} holds dicts in dicts, more than {_DEEPEST} deep")
    for key, value in content.items():
        if isinstance(value, kinds):
            yield (*path, str(key)), value
        elif isinstance(value, dict):
            yield from _leaves(value, (*path, str(key)), file, kinds)
