"""A rank's parameters as DTensors over the mesh, so that torch.distributed.checkpoint can save, load and reshard them.

The DTensors are views of the parameters' own memory, which must not be packed: loading into them fills the model. They
are for state only; no step runs through them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from ts_parallel.partition.program import ParameterPlan, TensorParallelPlan


def rank_state_dict(
    tensors: Mapping[str, torch.Tensor], plan: TensorParallelPlan, tp_mesh: DeviceMesh
) -> dict[str, DTensor]:
    """Parameter name, as in the checkpoint → DTensor of its full shape, without copies. Tied parameters appear once."""
    rank = tp_mesh.get_local_rank()
    return {name: _dtensor(tensors[name].detach(), entry, tp_mesh, rank) for name, entry in plan.parameters.items()}


def _dtensor(local: torch.Tensor, entry: ParameterPlan, mesh: DeviceMesh, rank: int) -> DTensor:
    shape = torch.Size(entry.shape)
    stride = torch.empty(shape, device="meta").stride()
    if entry.slices is None:
        return DTensor.from_local(local, mesh, [Replicate()], run_check=False)
    kept = entry.slices[rank]
    if _is_chunked(entry, mesh.size()):
        return DTensor.from_local(local, mesh, [Shard(kept.dim)], run_check=False, shape=shape, stride=stride)
    # Several pieces, or a piece that neighbours keep too: each is one box of the whole, at its own offset.
    boxes = list(torch.split(local, [length for _, length in kept.pieces], dim=kept.dim))
    offsets = [tuple(start if dim == kept.dim else 0 for dim in range(len(shape))) for start, _ in kept.pieces]
    wrapper = LocalShardsWrapper(boxes, offsets)
    return DTensor.from_local(wrapper, mesh, [Shard(kept.dim)], run_check=False, shape=shape, stride=stride)


def _is_chunked(entry: ParameterPlan, size: int) -> bool:
    """Whether the slices are those of DTensor's `Shard`, which cuts as `torch.chunk` does."""
    assert entry.slices is not None
    chunk = -(-entry.shape[entry.slices[0].dim] // size)
    return all(kept.pieces[0][0] == rank * chunk and len(kept.pieces) == 1 for rank, kept in enumerate(entry.slices))
