"""Ranks that each save their part of a state dict by torch.save, as an FSDP job does: `save_rank_files.py FOLDER ROWS`.

FOLDER holds the whole one as `whole.pt`. ROWS rows of ranks have the same. What has fewer rows than ranks is whole on
each; the others are cut along dim 0, or along dim 1 where their name says so.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def main(folder: Path, rows: int) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    names = ("fsdp",) if rows == 1 else ("ddp", "fsdp")
    mesh = init_device_mesh("cpu", (size,) if rows == 1 else (rows, size // rows), mesh_dim_names=names)
    own = {}
    for name, tensor in torch.load(folder / "whole.pt").items():
        if tensor.ndim == 0:
            own[name] = tensor
            continue
        placement = Replicate() if "whole" in name else Shard(int("columns" in name))
        placements = [*([Replicate()] * (len(names) - 1)), placement]
        if "both" in name:
            placements = [Shard(0)] * len(names)
        own[name] = distribute_tensor(tensor, mesh, placements)
    torch.save(own, folder / f"model_world_size_{size}_rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
