"""What torch.save wrote before torch 1.6, as places in the file; its pickles are read as data.

Five pickles: a magic number, the version of the format, the writing machine, the objects, the keys of the storages;
then of each storage, in the order of those keys, the number of its elements in eight bytes, and the elements.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ts_parallel.checkpoint.formats.pickles import DataUnpickler
from ts_parallel.checkpoint.formats.torch_pickles import TORCH_NAMES, Storage
from ts_parallel.errors import CheckpointError

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES = _MAGIC_NUMBER.to_bytes(10, "little")
_VERSION = 1001
_LONGEST_START = 32  # bytes that the magic number's pickle fits in, whatever its protocol
_COUNT_BYTES = 8


def is_old_torch_file(stream: io.BufferedIOBase) -> bool:
    start = stream.read(_LONGEST_START)
    stream.seek(0)
    return start[:1] == b"\x80" and _MAGIC_BYTES in start


def read_old_torch_file(stream: io.BufferedIOBase, file: Path) -> Any:
    """The object that torch.save wrote, `PickledTensor`s in it. No storage is read.

    Raises:
        CheckpointError: it is cut off, or its pickle names what is not plain data.
    """
    if _load(stream, file) != _MAGIC_NUMBER or _load(stream, file) != _VERSION:
        raise CheckpointError(f"{file} is in a format of torch.save that is not known")
    machine = _load(stream, file)
    if not isinstance(machine, dict) or not machine.get("little_endian", True):
        raise CheckpointError(f"{file} was written on a big-endian machine")
    start = stream.tell()
    # Where a storage lies is known only behind the objects: they are read once for what they need, then with its place.
    needed = _Objects(stream, file, None)
    needed.load()
    places = _find_places(stream, file, _load(stream, file), needed.sizes)
    stream.seek(start)
    return _Objects(stream, file, places).load()


def _load(stream: io.BufferedIOBase, file: Path) -> Any:
    return DataUnpickler(stream, {}, file).load()


class _Objects(DataUnpickler):
    """Owns the sizes, in elements and bytes, of the storages that were asked for."""

    def __init__(self, stream: io.BufferedIOBase, file: Path, places: Mapping[str, int] | None) -> None:
        super().__init__(stream, TORCH_NAMES, file)
        self._places = places
        self.sizes: dict[str, tuple[int, int]] = {}

    def persistent_load(self, saved: Any) -> Storage:
        kind, dtype, key, _, num_elements, *view = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(num_elements) is not int or num_elements < 0:
            raise ValueError(f"a storage {saved!r}")
        num_bytes = num_elements * dtype.itemsize
        self.sizes[str(key)] = (num_elements, num_bytes)
        offset = 0 if self._places is None else self._places[str(key)]
        if not view or view[0] is None:
            return Storage(dtype, offset, num_bytes)
        _, first, length = view[0]
        if any(type(number) is not int or number < 0 for number in (first, length)) or first + length > num_elements:
            raise ValueError(f"a view of a storage {saved!r}")
        return Storage(dtype, offset + first * dtype.itemsize, length * dtype.itemsize)


def _find_places(
    stream: io.BufferedIOBase, file: Path, keys: Any, sizes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Where the elements of each storage begin."""
    if not isinstance(keys, list) or {str(key) for key in keys} != sizes.keys():
        raise CheckpointError(f"{file} is cut off or damaged: it does not name the storages that its tensors lie in")
    end = stream.tell()
    size = stream.seek(0, io.SEEK_END)
    places = {}
    for key in map(str, keys):
        num_elements, num_bytes = sizes[key]
        stream.seek(end)
        if (count := int.from_bytes(stream.read(_COUNT_BYTES), "little")) != num_elements and end < size:
            raise CheckpointError(f"{file} is damaged: a storage of {count} elements, {num_elements} are needed")
        places[key] = end + _COUNT_BYTES
        end = places[key] + num_bytes
        if end > size:
            raise CheckpointError(f"{file} is cut off: {size} bytes, at least {end - size} more are needed")
    return places
