"""What the ranks of an FSDP job each saved by torch.save, as verl does: of every tensor the rows that the rank had.

A file's tensors are DTensors: a local tensor, and how the whole lies over the mesh of ranks. Where that is a row of
ranks, or several rows that have the same, their local tensors follow each other along one dim. It is read as data; no
mesh is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ts_parallel.checkpoint.formats.boxes import check_boxes
from ts_parallel.checkpoint.formats.pickles import Names, Record
from ts_parallel.checkpoint.formats.torch_files import check_layout, leaves_of_dict, read_torch_dict
from ts_parallel.checkpoint.formats.torch_pickles import TORCH_NAMES, PickledTensor
from ts_parallel.checkpoint.stored import NameFinder, StoredPart, StoredTensor, stored_whole
from ts_parallel.errors import CheckpointError

_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_MERGE = "merge them by `python -m verl.model_merger merge --backend fsdp --local_dir {} --target_dir OUT`"


def rank_files(folder: Path) -> list[Path]:
    """Those of a folder's files that hold one rank's part of a model, by the number of the rank."""
    found = [(match, file) for file in folder.glob("model_world_size_*.pt") if (match := _FILE.fullmatch(file.name))]
    return [file for _, file in sorted(found, key=lambda own: [int(number) for number in own[0].groups()])]


def read_rank_files(folder: Path, find_names: NameFinder) -> Iterator[StoredTensor]:
    """The model's tensors, which `find_names` tells, of files that `rank_files` finds.

    Raises:
        CheckpointError: a rank's file is missing or cannot be read, or the parts of a tensor lie over the ranks
            otherwise than in a row, or make up no tensor.
    """
    files = rank_files(folder)
    sizes = {int(match[1]) for file in files if (match := _FILE.fullmatch(file.name))}
    if len(sizes) > 1 or len(files) != max(sizes):
        raise CheckpointError(f"{folder} has {len(files)} files such as {files[0].name}: not one of each rank")
    ranks = [leaves_of_dict(read_torch_dict(file, _NAMES), file, (PickledTensor, _Part)) for file in files]
    own = {".".join(path): path for path in ranks[0]}
    for key, name in find_names(own, folder).items():
        parts = [rank.get(own[key]) for rank in ranks]
        yield _tensor(name, parts, files)


@dataclass(frozen=True)
class _Part:
    """A rank's part of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole."""
    placements: tuple[Any, ...]
    local: Any


class _Shard(Record):
    pass


class _Replicate(Record):
    pass


@dataclass(frozen=True)
class _Wrapper:
    dtype: torch.dtype
    shape: tuple[int, ...]


def _rebuild_wrapper(kind: Any, dtype: torch.dtype, shape: Sequence[int], *_: Any) -> _Wrapper:
    return _Wrapper(dtype, tuple(shape))


def _rebuild_from_type(function: Any, kind: Any, arguments: Sequence[Any], state: Any) -> Any:
    made = function(*arguments)
    if not isinstance(made, _Wrapper):
        return made
    own: dict[str, Any] = {}
    for each in state if isinstance(state, tuple) else (state,):
        own |= each or {}
    return _Part(made.dtype, made.shape, tuple(own["_spec"]["placements"]), own["_local_tensor"])


_TENSOR, _OLD_TENSOR = "torch.distributed.tensor", "torch.distributed._tensor"
_NAMES: Names = {
    **TORCH_NAMES,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch._utils", "_rebuild_wrapper_subclass"): _rebuild_wrapper,
    ("torch.distributed.device_mesh", "DeviceMesh"): Record,
    **{("torch.distributed._mesh_layout", name): Record for name in ("_MeshLayout", "_FlatLayout")},
    **{(module, "DTensor"): Record for module in (_TENSOR, f"{_TENSOR}._api", _OLD_TENSOR, f"{_OLD_TENSOR}.api")},
    **{
        (f"{module}._dtensor_spec", name): Record
        for module in (_TENSOR, _OLD_TENSOR)
        for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")
    },
    **{
        (f"{module}.placement_types", name): kind
        for module in (_TENSOR, _OLD_TENSOR)
        for name, kind in (
            ("Shard", _Shard),
            ("Replicate", _Replicate),
            ("TensorMeta", Record),
        )
    },
}


def _tensor(name: str, parts: Sequence[Any], files: Sequence[Path]) -> StoredTensor:
    first = parts[0]
    if isinstance(first, PickledTensor):  # on each rank the same
        check_layout(first, name, files[0])
        return stored_whole(name, files[0], first.dtype, first.shape, first.offset)
    dim = _dim(name, first, files[0])
    found: list[StoredPart] = []
    start = 0
    for part, file in zip(parts, files, strict=True):
        if not isinstance(part, _Part) or (part.dtype, part.shape) != (first.dtype, first.shape):
            raise CheckpointError(f"{name!r} is another tensor in {file} than in {files[0]}")
        local = _local(name, part, file)
        corner = tuple(start if each == dim else 0 for each in range(len(first.shape)))
        num_bytes = torch.Size(local.shape).numel() * local.dtype.itemsize
        if num_bytes or not found:
            found.append(StoredPart(file, corner, local.shape, local.offset, num_bytes))
        if dim is None:
            break
        start += local.shape[dim]
        if start >= first.shape[dim]:
            break  # ranks of another row have the same once more
    check_boxes(name, first.shape, [(part.corner, part.shape) for part in found], files[0].parent)
    return StoredTensor(name, first.dtype, first.shape, tuple(found))


def _local(name: str, part: _Part, file: Path) -> PickledTensor:
    local = part.local
    if not isinstance(local, PickledTensor) or local.dtype != part.dtype or len(local.shape) != len(part.shape):
        raise CheckpointError(f"{file} holds a part of {name!r} that is no tensor of {part.dtype}")
    return check_layout(local, name, file)


def _dim(name: str, part: _Part, file: Path) -> int | None:
    """Along which the parts of the ranks follow each other; None where each rank has the whole."""
    *others, last = part.placements or (None,)
    dim = _dim_of_shard(last) if isinstance(last, _Shard) else None
    is_row = isinstance(last, _Replicate) or (dim is not None and 0 <= dim < len(part.shape))
    if not is_row or not all(isinstance(each, _Replicate) for each in others):
        raise CheckpointError(
            f"{name!r} in {file} does not lie over one row of ranks, as FSDP alone has it: {_MERGE.format(file.parent)}"
        )
    return dim


def _dim_of_shard(shard: _Shard) -> int | None:
    state: Any = shard.state
    dim = state.get("dim") if isinstance(state, Mapping) else (state[0] if state else None)
    return dim if type(dim) is int else None
