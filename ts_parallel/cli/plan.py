"""`ts-parallel plan`: what each rank would hold, found out without reading a weight."""

from __future__ import annotations

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ts_parallel.checkpoint.source import locate_checkpoint
from ts_parallel.cli.options import Dtype, KVCacheMemory, Model, TensorParallelSize
from ts_parallel.config import parse_config
from ts_parallel.partition.build import RankModel, shard_deferred
from ts_parallel.partition.deferred import choose_dtype, read_model_config
from ts_parallel.runtime.kv_memory import bytes_per_token
from ts_parallel.topology import TensorParallelGroup


def plan(
    model: Model,
    tensor_parallel_size: TensorParallelSize = 1,
    dtype: Dtype = "auto",
    kv_cache_memory: KVCacheMemory = "512MiB",
) -> None:
    """Print every parameter's placement, each rank's bytes, and how many tokens of KV cache fit."""
    folder = locate_checkpoint(model)
    config = parse_config({"model_path": str(folder), "dtype": dtype, "kv_cache_memory": kv_cache_memory})
    model_config = read_model_config(folder)
    element = choose_dtype(config.dtype, model_config)
    part = shard_deferred(model_config, element, TensorParallelGroup(0, tensor_parallel_size))
    console = Console()
    console.print(_placements(part))
    console.print(_ranks(part, config.kv_cache_memory, element))


def _placements(part: RankModel) -> Table:
    table = Table("parameter", "shape", "placement", "bytes on rank 0", box=box.SIMPLE)
    for entry in part.plan.parameters.values():
        name = " = ".join((entry.name, *entry.aliases))
        table.add_row(name, "×".join(map(str, entry.shape)), entry.describe(), f"{entry.local_bytes(0):,}")
    return table


def _ranks(part: RankModel, kv_cache_memory: int, dtype: torch.dtype) -> Table:
    per_token = bytes_per_token(part.sites, dtype)
    table = Table(
        "rank", "weights, MB", "KV bytes a token", f"tokens in {kv_cache_memory:,} bytes of KV", box=box.SIMPLE
    )
    for rank in range(part.plan.size):
        megabytes = part.plan.local_bytes(rank) / 1e6
        table.add_row(str(rank), f"{megabytes:,.1f}", f"{per_token:,}", f"{kv_cache_memory // per_token:,}")
    return table
