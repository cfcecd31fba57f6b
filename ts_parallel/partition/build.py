"""How a weight reaches its device, on one screen: `build_rank_model`.

deferred model → tensor-parallel plan → shards → trace → stages → memory for this rank's stages → their bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ts_parallel.checkpoint.index import CheckpointIndex, read_index
from ts_parallel.checkpoint.load import load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.partition.attention_sites import AttentionSite, find_attention_sites
from ts_parallel.partition.causal_lm import trace_causal_lm
from ts_parallel.partition.deferred import build_deferred, choose_dtype, materialise, read_model_config
from ts_parallel.partition.dense_attention import IMPLEMENTATION as DENSE
from ts_parallel.partition.dense_attention import find_dense_sites
from ts_parallel.partition.encoder import ModelCall, call_of_task
from ts_parallel.partition.match import load_items, match_checkpoint
from ts_parallel.partition.plan import TensorParallelPlan, plan_tensor_parallel
from ts_parallel.partition.shard import apply_tensor_parallel
from ts_parallel.partition.stages import (
    Crossing,
    LayerCosts,
    Places,
    StageGraph,
    check_borders,
    choose_borders,
    cut,
    find_layers,
    weigh,
)
from ts_parallel.partition.trace import TracedGroup, TracedModel, attention_marker, trace
from ts_parallel.topology import TensorParallelGroup


@dataclass(frozen=True)
class PipelinePlace:
    """Which stages a rank has: of `num_ranks × virtual_stages` in a row, each `num_ranks`-th from `rank` on."""

    rank: int = 0
    num_ranks: int = 1
    virtual_stages: int = 1
    split_points: tuple[int, ...] | None = None
    """First layer of each stage after the first, where the user has chosen them."""

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.virtual_stages


@dataclass(frozen=True)
class ShardedModel:
    """A deferred model of which each parameter has the shape that one tensor-parallel rank keeps."""

    model: PreTrainedModel
    plan: TensorParallelPlan
    sites: tuple[AttentionSite, ...]
    """Its attention calls, as they were before."""


@dataclass(frozen=True)
class StagedModel:
    """A sharded model, traced and cut."""

    sharded: ShardedModel
    stages: tuple[StageGraph, ...]
    """All of them, in order."""
    borders: tuple[int, ...]
    costs: LayerCosts
    """Of its layers on this tensor-parallel rank."""

    def plan_of(self, stages: Sequence[StageGraph]) -> TensorParallelPlan:
        """The plan of the parameters that these stages have."""
        names = {name for stage in stages for name in stage.tensors.values()}
        return self.sharded.plan.only(names)


@dataclass(frozen=True)
class RankModel:
    """One rank's part of a model, loaded."""

    model: PreTrainedModel
    plan: TensorParallelPlan
    """Of the parameters that this rank has."""
    whole_plan: TensorParallelPlan
    """Of the parameters that any rank has."""
    stages: tuple[StageGraph, ...]
    """This rank's; none where the model's own modules run."""
    all_stages: tuple[StageGraph, ...]
    """Those of all ranks, in order."""
    sites_of_ranks: tuple[tuple[AttentionSite, ...], ...]
    """The attention calls of each pipeline rank, with the heads that one tensor-parallel rank has."""
    seconds: float = 0.0
    """What reading its weights took."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    """Every parameter and buffer under all its names; those of other ranks are without memory."""

    @property
    def inputs_by_stage(self) -> list[tuple[str, ...]]:
        """The model inputs that each of all stages reads."""
        return [tuple(dict.fromkeys(stage.inputs.values())) for stage in self.all_stages]

    @property
    def output(self) -> Crossing:
        """What the last stage makes."""
        last = self.all_stages[-1]
        return last.crossings[last.sent[0]]

    def release(self, name: str) -> None:
        """Give up the memory of a parameter that was packed into another form."""
        tensor = self.tensors[name]
        empty = torch.nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
        for alias in [alias for alias, other in self.tensors.items() if other is tensor]:
            owner, _, leaf = alias.rpartition(".")
            self.model.get_submodule(owner).register_parameter(leaf, empty)
            del self.tensors[alias]


def build_rank_model(
    folder: Path,
    dtype: str,
    group: TensorParallelGroup,
    device: torch.device,
    place: PipelinePlace | None = PipelinePlace(),
) -> RankModel:
    """This rank's part of the checkpoint in `folder`, ready to run: the way of a weight from file to device.

    Args:
        place: None where the model's own modules are to run instead of a traced stage.

    Raises:
        CheckpointError: the folder's files do not hold the model that its config.json describes.
        PlanError: the model cannot be traced, or split as asked.
    """
    config = read_model_config(folder)
    index = read_index(folder)
    if place is None:
        sharded = shard_causal_lm(config, choose_dtype(dtype, config), group)
        part = eager_part(sharded)
    else:
        sharded = shard_causal_lm(config, choose_dtype(dtype, config), TracedGroup(group.rank, group.size))
        part = part_of(cut_causal_lm(sharded, place), place)
    return load_part(part, index, group, device)


def shard_causal_lm(config: PretrainedConfig, dtype: torch.dtype, group: TensorParallelGroup) -> ShardedModel:
    """A causal language model, planned and sharded for one rank of `group`, without any weight in memory."""
    model = build_deferred(config, dtype)
    sites = find_attention_sites(model)
    plan = plan_tensor_parallel(model, sites, group.size)
    if group.size > 1:
        apply_tensor_parallel(model, plan, group)
    return ShardedModel(model, plan, sites)


def cut_causal_lm(sharded: ShardedModel, place: PipelinePlace) -> StagedModel:
    traced, sites = trace_causal_lm(sharded.model, len(sharded.sites))
    return cut_into_stages(sharded, traced, place, sites)


def cut_into_stages(
    sharded: ShardedModel, traced: TracedModel, place: PipelinePlace, sites: Sequence[AttentionSite] = ()
) -> StagedModel:
    layers, num_layers = find_layers(sharded.model, num_layers_of(sharded.model.config))
    places = Places(traced, layers, num_layers)
    costs = weigh(places, {name: tensor.nbytes for name, tensor in all_tensors(sharded.model).items()})
    if place.split_points is None:
        borders = choose_borders(costs, place.num_stages)
    else:
        borders = check_borders(place.split_points, num_layers, place.num_stages)
    stages = cut(places, borders, sites, attention_marker._opoverload)
    return StagedModel(sharded, stages, borders, costs)


def part_of(staged: StagedModel, place: PipelinePlace) -> RankModel:
    """What the rank at `place` has of the model, not yet in memory."""
    own = staged.stages[place.rank :: place.num_ranks]
    sites = tuple(
        tuple(site for stage in staged.stages[rank :: place.num_ranks] for site in stage.sites)
        for rank in range(place.num_ranks)
    )
    whole_plan = staged.plan_of(staged.stages)
    return RankModel(staged.sharded.model, staged.plan_of(own), whole_plan, own, staged.stages, sites)


def eager_part(sharded: ShardedModel) -> RankModel:
    """All of a sharded model, to run its own modules."""
    return RankModel(sharded.model, sharded.plan, sharded.plan, (), (), (find_attention_sites(sharded.model),))


def load_part(part: RankModel, index: CheckpointIndex, group: TensorParallelGroup, device: torch.device) -> RankModel:
    """Give this rank's tensors their memory and fill it; what other ranks need must be in the checkpoint too."""
    sources = match_checkpoint(part.model, part.whole_plan, index)
    used = {name for stage in part.stages for name in stage.tensors.values()}
    materialise(part.model, device, used or None)
    tensors = all_tensors(part.model)
    started = time.perf_counter()
    items = load_items(tensors, part.plan, sources, group.rank)
    load_tensors(items, Progress(f"loading rank {group.rank} of {group.size}", is_shown=group.rank == 0))
    return replace(part, seconds=time.perf_counter() - started, tensors=tensors)


def all_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under all its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)


def build_batch_model(
    folder: Path, task: str, dtype: str, group: TensorParallelGroup, place: PipelinePlace, device: torch.device
) -> RankModel:
    """This rank's part of a model that is no causal language model; `task` is one of `encoder.TASKS`.

    Raises:
        CheckpointError: the folder's files do not hold the model that its config.json describes.
        PlanError: the model cannot be traced, or split as asked.
    """
    config = read_model_config(folder)
    index = read_index(folder)
    own_dtype = choose_dtype(dtype, config)
    call = call_of_task(task, folder, config, own_dtype)
    sharded = shard_dense(config, call, own_dtype, TracedGroup(group.rank, group.size))
    return load_part(part_of(cut_dense(sharded, call, place), place), index, group, device)


def shard_dense(
    config: PretrainedConfig, call: ModelCall, dtype: torch.dtype, group: TensorParallelGroup
) -> ShardedModel:
    """A model of any other kind, planned and sharded for one rank of `group`, without any weight in memory."""
    model = build_deferred(config, dtype, call.auto_class, DENSE)
    sites = find_dense_sites(model, lambda inputs: call.call(model, inputs), call.inputs)
    if len(sites) < num_layers_of(config):
        # Attention code of its own, which may not understand the masks that are made for ours: take its own masks too.
        model, sites = build_deferred(config, dtype, call.auto_class, "eager"), ()
    plan = plan_tensor_parallel(model, sites, group.size)
    if group.size > 1:
        apply_tensor_parallel(model, plan, group)
    return ShardedModel(model, plan, sites)


def cut_dense(sharded: ShardedModel, call: ModelCall, place: PipelinePlace) -> StagedModel:
    traced = trace(sharded.model, call.inputs, lambda inputs: call.call(sharded.model, inputs), call.limits)
    return cut_into_stages(sharded, traced, place)


def num_layers_of(config: PretrainedConfig) -> int:
    """How many layers the model has; 0 where its config names no number."""
    return int(getattr(config.get_text_config(), "num_hidden_layers", 0))
