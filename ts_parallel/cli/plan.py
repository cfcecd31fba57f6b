"""`ts-parallel plan`: what each rank would hold, found out without reading a weight."""

from __future__ import annotations

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ts_parallel.checkpoint.index import read_index_if_whole
from ts_parallel.checkpoint.quantized import refuse_quantized
from ts_parallel.checkpoint.source import locate_checkpoint
from ts_parallel.cli.handler_options import HandlerKeys, takes_handler_keys
from ts_parallel.cli.options import Model
from ts_parallel.config import parse_config
from ts_parallel.partition.build import ShardedModel, StagedModel, cut_causal_lm, shard_causal_lm
from ts_parallel.partition.graph.stages import shares
from ts_parallel.partition.graph.trace import TracedGroup
from ts_parallel.partition.model.model_config import choose_dtype, read_model_config
from ts_parallel.partition.program import PipelinePlace
from ts_parallel.partition.strangers import refuse_strangers
from ts_parallel.runtime.backends.choose import own_dtype


@takes_handler_keys(
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "split_points",
    "dtype",
    "kv_cache_memory",
    "config_path",
    "enable_expert_parallel",
)
def plan(model: Model, keys: HandlerKeys) -> None:
    """Print every parameter's placement, the stages' cut, each rank's bytes, and how many tokens of KV cache fit."""
    folder = locate_checkpoint(model)
    settings = parse_config({"model_path": str(folder), **keys})
    refuse_quantized(folder, settings.config_folder)
    model_config = read_model_config(settings.config_folder or folder)
    element = choose_dtype(own_dtype(settings.dtype, settings.device), model_config)
    group = TracedGroup(0, settings.tensor_parallel_size)
    index = read_index_if_whole(folder, settings.config_folder)
    sharded = shard_causal_lm(model_config, element, group, settings.enable_expert_parallel, index)
    refuse_strangers(sharded.model, index)
    place = PipelinePlace(0, settings.pipeline_parallel_size, split_points=settings.split_points)
    staged = cut_causal_lm(sharded, place)
    console = Console()
    console.print(_placements(sharded, staged))
    console.print(_ranks(staged, settings.kv_cache_memory, element))


def _placements(sharded: ShardedModel, staged: StagedModel) -> Table:
    table = Table("parameter", "shape", "stage", "placement", "bytes on its first rank", box=box.SIMPLE)
    experts = tuple(f"{name}." for name, style in sharded.plan.styles.items() if style == "whole_experts")
    for entry in sharded.plan.parameters.values():
        names = {entry.name, *entry.aliases}
        stages = [str(number) for number, stage in enumerate(staged.stages) if names & set(stage.tensors.values())]
        name = " = ".join((entry.name, *entry.aliases))
        shape = "×".join(map(str, entry.shape))
        placement = entry.describe() + ", whole experts" * (entry.slices is not None and name.startswith(experts))
        table.add_row(name, shape, ", ".join(stages) or "none", placement, f"{entry.local_bytes(0):,}")
    return table


def _ranks(staged: StagedModel, kv_cache_memory: int, dtype: torch.dtype) -> Table:
    """A stage's share is half that of its bytes, half that of the bytes a step reads: its memory and its time."""
    tokens = f"tokens in {kv_cache_memory:,} bytes of KV"
    table = Table("rank", "stage", "layers", "weights, MB", "share", "KV bytes a token", tokens, box=box.SIMPLE)
    weights = shares(staged.costs)
    edges = [0, *staged.borders, len(weights) - 2]
    for number, stage in enumerate(staged.stages):
        first, end = edges[number : number + 2]
        share = sum(weights[first + (number > 0) : end + 1 + (number == len(staged.stages) - 1)])
        plan = staged.plan_of([stage])
        for rank in range(plan.size):
            per_token = plan.kv_elements_per_token(stage.sites, rank) * dtype.itemsize
            table.add_row(
                str(number * plan.size + rank),
                str(number),
                f"{first}–{end - 1}",
                f"{plan.local_bytes(rank) / 1e6:,.1f}",
                f"{share:.0%}",
                f"{per_token:,}",
                f"{kv_cache_memory // per_token:,}",
            )
    return table
