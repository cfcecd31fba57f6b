"""A checkpoint as one safetensors file or shards with an index, named and laid out as transformers does."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ts_parallel.checkpoint.conversion.pieces import Lengths, PlannedFile, bytes_of, cut_rows
from ts_parallel.checkpoint.formats.safetensors_files import DTYPES
from ts_parallel.checkpoint.index import SHARD_INDEX, SINGLE_FILE, CheckpointIndex, StoredTensor
from ts_parallel.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Safetensors:
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Most bytes of one file's tensors; a tensor that is larger has a file of its own."""

    @property
    def settings(self) -> Mapping[str, str | int]:
        return {"to": "safetensors", "max_shard_bytes": self.max_shard_bytes}

    def plan(self, index: CheckpointIndex) -> list[PlannedFile]:
        """
        Raises:
            CheckpointError: a tensor's dtype is none that safetensors files of this package have.
        """
        for tensor in index.values():
            if tensor.dtype not in _NAMES:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)
                raise CheckpointError(
                    f"{tensor.name!r} is {tensor.dtype}, safetensors files hold {known}: convert to dcp instead"
                )
        shards = self._shards(index.values())
        if len(shards) == 1:
            return [_planned(SINGLE_FILE, shards[0])]
        stem, _, suffix = SINGLE_FILE.partition(".")
        names = [f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" for number in range(1, len(shards) + 1)]
        return [_planned(name, shard) for name, shard in zip(names, shards, strict=True)]

    def encode(self, tensor: torch.Tensor) -> memoryview:
        return bytes_of(tensor).numpy().data

    def index_file(self, files: Sequence[PlannedFile], lengths: Lengths) -> tuple[str, bytes] | None:
        if len(files) == 1:
            return None
        total = sum(length for file in files for length in lengths[file.name])
        weight_map = {piece.source.name: file.name for file in files for piece in file.pieces}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return SHARD_INDEX, (json.dumps(content, indent=2) + "\n").encode()

    def _shards(self, tensors: Iterable[StoredTensor]) -> list[list[StoredTensor]]:
        """In the source's order: what is used together stays together."""
        shards: list[list[StoredTensor]] = [[]]
        size = 0
        for tensor in tensors:
            if shards[-1] and size + tensor.num_bytes > self.max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += tensor.num_bytes
        return shards


def _planned(name: str, tensors: Sequence[StoredTensor]) -> PlannedFile:
    # The widest elements first, as the safetensors library does, so that each tensor lies aligned.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.num_bytes
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[tensor.name] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    pieces = tuple(piece for tensor in ordered for piece in cut_rows(tensor))
    return PlannedFile(name, struct.pack("<Q", len(text)) + text, pieces)
