"""A checkpoint as a torch.distributed.checkpoint folder, as FSDP2 leaves it behind: a file of each rank's rows.

It is here and not in the checkpoint room because its `.metadata` is a pickle of torch.distributed's own classes.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, DEFAULT_SUFFIX, _metadata_fn, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ts_parallel.checkpoint.conversion.pieces import Lengths, Piece, PlannedFile, cut_rows
from ts_parallel.checkpoint.index import CheckpointIndex, StoredTensor


@dataclass(frozen=True)
class DistributedCheckpoint:
    num_ranks: int = 1

    @property
    def settings(self) -> Mapping[str, str | int]:
        return {"to": "dcp", "ranks": self.num_ranks}

    def plan(self, index: CheckpointIndex) -> list[PlannedFile]:
        ranks: list[list[Piece]] = [[] for _ in range(self.num_ranks)]
        for tensor in index.values():
            for pieces, own in zip(ranks, self._rows_of_ranks(tensor), strict=True):
                pieces += own
        return [PlannedFile(f"__{rank}_0{DEFAULT_SUFFIX}", b"", tuple(pieces)) for rank, pieces in enumerate(ranks)]

    def encode(self, tensor: torch.Tensor) -> memoryview:
        buffer = io.BytesIO()  # not the file: an error of its disk would not come out of torch.save as what it is
        torch.save(tensor, buffer)
        return buffer.getbuffer()

    def index_file(self, files: Sequence[PlannedFile], lengths: Lengths) -> tuple[str, bytes] | None:
        tensors: dict[str, TensorStorageMetadata] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for file in files:
            offset = 0
            for piece, length in zip(file.pieces, lengths[file.name], strict=True):
                source = piece.source
                entry = tensors.setdefault(
                    source.name, TensorStorageMetadata(TensorProperties(source.dtype), torch.Size(source.shape), [])
                )
                chunk = ChunkStorageMetadata(_offsets(piece), torch.Size(piece.shape))
                place = MetadataIndex(source.name, chunk.offsets, len(entry.chunks))
                storage[place] = _StorageInfo(file.name, offset, length)
                entry.chunks.append(chunk)
                offset += length
        keys = {name: (name,) for name in tensors}
        metadata = Metadata({**tensors}, keys, storage, StorageMeta(), CURRENT_DCP_VERSION)
        return _metadata_fn, pickle.dumps(metadata)

    def _rows_of_ranks(self, tensor: StoredTensor) -> list[list[Piece]]:
        """As `Shard(0)` cuts: equal chunks, rounded up, so that the last ranks may have fewer rows or none."""
        if not tensor.num_bytes or not tensor.shape:
            return [cut_rows(tensor), *([] for _ in range(1, self.num_ranks))]
        rows = tensor.shape[0]
        chunk = -(-rows // self.num_ranks)
        starts = [min(rows, rank * chunk) for rank in range(self.num_ranks + 1)]
        return [cut_rows(tensor, start, end) if start < end else [] for start, end in itertools.pairwise(starts)]


def _offsets(piece: Piece) -> torch.Size:
    return torch.Size(() if piece.rows is None else (piece.rows[0], *[0] * (len(piece.shape) - 1)))
