"""What a GGUF file says of itself: keys and values, and where each tensor lies. Reads no number of a tensor.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ts_parallel.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_ENTRIES, _MOST_DIMS, _LONGEST_TEXT = 10**8, 4, 2**31
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    name: str
    kind: int
    """Of ggml's types."""
    shape: tuple[int, ...]
    """The last dim is that which lies together."""
    offset: int
    """In the file."""


@dataclass(frozen=True)
class GgufHeader:
    file: Path
    values: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))


def read_header(file: Path) -> GgufHeader:
    """
    Raises:
        CheckpointError: it is cut off, or no GGUF file of a version that is known here.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            return _Reader(stream, file, size).header()
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError):
        raise CheckpointError(f"{file} is cut off or no GGUF file: {size} bytes, and its header does not end") from None


class _Reader:
    def __init__(self, stream: BinaryIO, file: Path, size: int) -> None:
        self._stream, self._file, self._size = stream, file, size

    def header(self) -> GgufHeader:
        if self._stream.read(4) != MAGIC:
            raise CheckpointError(f"{self._file} is no GGUF file: it does not begin with {MAGIC.decode()!r}")
        version = self._number("I")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self._file} is of GGUF version {version}; {_VERSIONS} are read here")
        num_tensors, num_values = self._count(), self._count()
        values = {self._text(): self._value(self._number("I")) for _ in range(num_values)}
        if values.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{self._file} is one of {values['split.count']} parts: join them by gguf-split --merge"
            )
        described = [self._tensor() for _ in range(num_tensors)]
        alignment = int(values.get("general.alignment", 32))
        start = -(-self._stream.tell() // alignment) * alignment
        tensors = tuple(GgufTensor(name, kind, shape, start + offset) for name, kind, shape, offset in described)
        return GgufHeader(self._file, values, tensors)

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, num_dims = self._text(), self._number("I")
        if num_dims > _MOST_DIMS:
            raise KeyError(num_dims)
        shape = tuple(self._number("Q") for _ in range(num_dims))
        return name, self._number("I"), tuple(reversed(shape)), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            own, count = self._number("I"), self._count()
            if own in _NUMBERS:
                return list(
                    struct.unpack(f"<{count}{_NUMBERS[own]}", self._bytes(count * struct.calcsize(_NUMBERS[own])))
                )
            return [self._value(own) for _ in range(count)]
        return self._number(_NUMBERS[kind])

    def _text(self) -> str:
        length = self._number("Q")
        if length > _LONGEST_TEXT:
            raise KeyError(length)
        return self._bytes(length).decode(errors="replace")

    def _count(self) -> int:
        count: int = self._number("Q")
        if count > min(_MOST_ENTRIES, self._size):
            raise KeyError(count)
        return count

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self._size:
            raise KeyError(count)
        return self._stream.read(count)


def check_ends(header: GgufHeader, num_bytes: Mapping[str, int]) -> None:
    """
    Args:
        num_bytes: of each tensor.

    Raises:
        CheckpointError: the file ends before its last tensor does.
    """
    size = header.file.stat().st_size
    for tensor in header.tensors:
        missing = tensor.offset + num_bytes[tensor.name] - size
        if missing > 0:
            raise CheckpointError(
                f"{header.file} is cut off: {size} bytes, at least {missing} more are needed for {tensor.name!r}"
            )
