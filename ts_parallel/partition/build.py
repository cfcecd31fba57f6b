"""How a rank's program is made of the unmodified model, on one screen: `make_programs`.

deferred model → tensor-parallel plan → shards → trace → stages → code, and the checkpoint's tensors for each parameter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.fx import Node
from transformers import PretrainedConfig, PreTrainedModel

from ts_parallel.checkpoint.index import CheckpointIndex, read_index
from ts_parallel.checkpoint.load import load_tensors
from ts_parallel.checkpoint.quantized import refuse_quantized
from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.errors import PlanError
from ts_parallel.partition.graph.stage_code import write_stage
from ts_parallel.partition.graph.stages import (
    LayerCosts,
    Places,
    StageGraph,
    check_borders,
    choose_borders,
    cut,
    find_layers,
    weigh,
)
from ts_parallel.partition.graph.trace import TracedGroup, TracedModel, attention_marker, trace
from ts_parallel.partition.load import RankModel, load_items, load_progress
from ts_parallel.partition.match import match_checkpoint, untie
from ts_parallel.partition.model.attention_sites import LENGTH_DEPENDENT_ROPE, find_attention_sites
from ts_parallel.partition.model.causal_lm import trace_causal_lm
from ts_parallel.partition.model.deferred import build_deferred, materialise
from ts_parallel.partition.model.dense_attention import IMPLEMENTATION as DENSE
from ts_parallel.partition.model.dense_attention import find_dense_sites
from ts_parallel.partition.model.encoder import ModelCall, call_of_task
from ts_parallel.partition.model.model_config import choose_dtype, max_positions_of, read_model_config
from ts_parallel.partition.model.seq2seq import (
    SEQ2SEQ_TASKS,
    Seq2SeqCall,
    TracedPart,
    as_applied,
    call_of_seq2seq,
    compute_unsaved,
    decoder_layers,
    encoder_layers,
    run_whole,
    trace_parts,
    with_own_biases,
    with_tokens,
)
from ts_parallel.partition.program import (
    AttentionSite,
    PipelinePlace,
    ProgramRequest,
    RankProgram,
    Sources,
    StageCode,
    TensorParallelPlan,
)
from ts_parallel.partition.strangers import refuse_strangers
from ts_parallel.partition.tensor_parallel.plan import is_possible, plan_tensor_parallel
from ts_parallel.partition.tensor_parallel.shard import OwnHeads, apply_tensor_parallel
from ts_parallel.topology import TensorParallelGroup


@dataclass(frozen=True)
class ShardedModel:
    """A deferred model of which each parameter has the shape that one tensor-parallel rank keeps."""

    model: PreTrainedModel
    plan: TensorParallelPlan
    sites: tuple[AttentionSite, ...]
    """Its attention calls, as they were before."""
    untied: tuple[str, ...] = ()
    """Parameters that its configuration ties and its checkpoint does not."""


@dataclass(frozen=True)
class StagedModel:
    """A sharded model, traced and cut."""

    sharded: ShardedModel
    stages: tuple[StageGraph, ...]
    """All of them, in order."""
    borders: tuple[int, ...]
    costs: LayerCosts
    """Of its layers on this tensor-parallel rank."""
    ends: tuple[int, ...] = (-1,)
    """The numbers of the stages whose outputs the leader gets."""
    kept: Mapping[Node, str] = field(default_factory=dict)
    """What a stage sends nowhere: see `StageCode.kept`."""

    def plan_of(self, stages: Sequence[StageGraph]) -> TensorParallelPlan:
        """The plan of the parameters that these stages have."""
        names = {name for stage in stages for name in stage.tensors.values()}
        return self.sharded.plan.only(names)


def make_programs(request: ProgramRequest, index: CheckpointIndex) -> dict[tuple[int, int], RankProgram]:
    """The programs of all ranks, by tensor-parallel rank and pipeline rank, whichever `request` names.

    Ranks whose parameters have the same shapes run the same code, so one trace is usually good for all.

    Raises:
        CheckpointError: the folder's files do not hold the model that its config.json describes.
        ConfigError: dtype or task are none that can be.
        PlanError: the model cannot be traced, or split as asked.
    """
    first = stage_model(request, 0, index)
    made: dict[object, list[RankProgram]] = {}
    programs: dict[tuple[int, int], RankProgram] = {}
    for rank in range(request.size):
        kind = _kind_of_rank(first.sharded, rank)
        if kind not in made:
            # Ranks of one stage must agree on where it ends, whatever each of them weighs.
            place = replace(request.place, split_points=first.borders)
            staged = first if rank == 0 else stage_model(replace(request, place=place), rank, index)
            sources = match_checkpoint(staged.sharded.model, staged.plan_of(staged.stages), index)
            places = [replace(request.place, rank=place) for place in range(request.place.num_ranks)]
            made[kind] = [program_of(staged, place, sources) for place in places]
        programs |= {(rank, place): program for place, program in enumerate(made[kind])}
    return programs


def _kind_of_rank(sharded: ShardedModel, rank: int) -> object:
    """Ranks of one kind run the same code: their parameters have the same shapes, and none has names of its own."""
    if any(isinstance(module, OwnHeads) for module in sharded.model.modules()):
        return rank
    return tuple(entry.local_shape(rank) for entry in sharded.plan.parameters.values())


def stage_model(request: ProgramRequest, rank: int, index: CheckpointIndex | None = None) -> StagedModel:
    """The model as one tensor-parallel rank runs it, traced and cut.

    Args:
        index: looked through before the trace, where it is given, as `untie` and `refuse_strangers` do.
    """
    config = read_model_config(request.settings or request.folder)
    dtype = choose_dtype(request.dtype, config)
    group = TracedGroup(rank, request.size)
    if request.task is None:
        sharded = shard_causal_lm(config, dtype, group, request.expert_parallel, index)
        refuse_strangers(sharded.model, index or {})
        return cut_causal_lm(sharded, request.place)
    if request.task in SEQ2SEQ_TASKS:
        seq2seq = call_of_seq2seq(request.task, config, dtype)
        sharded = shard_seq2seq(config, seq2seq, dtype, group, index)
        refuse_strangers(sharded.model, index or {})
        return cut_seq2seq(sharded, trace_parts(sharded.model, seq2seq), request.place)
    home = request.settings or settings_folder(request.folder)
    call = call_of_task(request.task, home, config, dtype)
    sharded = shard_dense(config, call, dtype, group, index)
    refuse_strangers(sharded.model, index or {})
    return cut_dense(sharded, call, request.place)


def shard_causal_lm(
    config: PretrainedConfig,
    dtype: torch.dtype,
    group: TensorParallelGroup,
    expert_parallel: bool = False,
    index: CheckpointIndex | None = None,
) -> ShardedModel:
    """A causal language model, planned and sharded for one rank of `group`, without any weight in memory.

    Args:
        index: of its checkpoint, which says what is tied.
    """
    model = build_deferred(config, dtype)
    untied = untie(model, index or {})
    sites = find_attention_sites(model)
    plan = plan_tensor_parallel(model, sites, group.size, expert_parallel)
    if group.size > 1:
        apply_tensor_parallel(model, plan, group)
    return ShardedModel(model, plan, sites, untied)


def cut_causal_lm(sharded: ShardedModel, place: PipelinePlace) -> StagedModel:
    traced, sites = trace_causal_lm(sharded.model, len(sharded.sites))
    return cut_into_stages(sharded, traced, place, sites)


def cut_into_stages(
    sharded: ShardedModel,
    traced: TracedModel,
    place: PipelinePlace,
    sites: Sequence[AttentionSite] = (),
    found: tuple[str, int] | None = None,
) -> StagedModel:
    """
    Args:
        found: name and length of the list of layers, where it is not the one that the model's config counts.
    """
    layers, num_layers = found or find_layers(sharded.model, num_layers_of(sharded.model.config))
    places = Places(traced, layers, num_layers)
    costs = weigh(places, {name: tensor.nbytes for name, tensor in all_tensors(sharded.model).items()})
    if place.split_points is None:
        borders = choose_borders(costs, place.num_stages)
    else:
        borders = check_borders(place.split_points, num_layers, place.num_stages)
    stages = cut(places, borders, sites, attention_marker._opoverload)
    return StagedModel(sharded, stages, borders, costs)


def shard_dense(
    config: PretrainedConfig,
    call: ModelCall,
    dtype: torch.dtype,
    group: TensorParallelGroup,
    index: CheckpointIndex | None = None,
) -> ShardedModel:
    """A model of any other kind, planned and sharded for one rank of `group`, without any weight in memory."""
    model, sites = _dense_model(config, call, dtype)
    untied = untie(model, index or {})
    whole = {site.module_name for site in sites if not is_possible(site, group.size)}
    plan = plan_tensor_parallel(model, sites, group.size, whole=whole)
    if group.size > 1:
        apply_tensor_parallel(model, as_applied(model, plan), group)
    return ShardedModel(model, plan, sites, untied)


def _dense_model(
    config: PretrainedConfig, call: ModelCall, dtype: torch.dtype
) -> tuple[PreTrainedModel, tuple[AttentionSite, ...]]:
    """The deferred model and its attention calls. One with attention code of its own, which may not understand the
    masks that are made for ours, has its own masks too, and no calls."""
    try:
        model = build_deferred(config, dtype, call.auto_class, DENSE)
    except PlanError:
        return build_deferred(config, dtype, call.auto_class, "eager"), ()
    sites = find_dense_sites(model, lambda inputs: call.call(model, inputs), call.inputs, call.least)
    if len(sites) >= num_layers_of(config):
        return model, sites
    return build_deferred(config, dtype, call.auto_class, "eager"), ()


def cut_dense(sharded: ShardedModel, call: ModelCall, place: PipelinePlace) -> StagedModel:
    traced = trace(sharded.model, call.inputs, lambda inputs: call.call(sharded.model, inputs), call.limits, call.least)
    return cut_into_stages(sharded, traced, place)


def shard_seq2seq(
    config: PretrainedConfig,
    call: Seq2SeqCall,
    dtype: torch.dtype,
    group: TensorParallelGroup,
    index: CheckpointIndex | None = None,
) -> ShardedModel:
    """An encoder–decoder model, planned and sharded for one rank of `group`, without any weight in memory."""
    model = build_deferred(config, dtype, call.auto_class, DENSE)
    untied = untie(model, index or {})
    compute_unsaved(model)
    sites = find_dense_sites(model, lambda inputs: run_whole(model, inputs), with_tokens(call.inputs))
    expected = encoder_layers(model)[1] + 2 * decoder_layers(model)[1]
    if len(sites) < expected:
        raise PlanError(
            f"{type(model).__name__} sends {len(sites)} attention calls through transformers' interface, {expected} "
            "were expected: its own attention code cannot be served"
        )
    plan = plan_tensor_parallel(model, sites, group.size)
    if group.size > 1:
        plan = with_own_biases(model, plan)
        apply_tensor_parallel(model, as_applied(model, plan), group)
    return ShardedModel(model, plan, sites, untied)


def cut_seq2seq(sharded: ShardedModel, parts: Sequence[TracedPart], place: PipelinePlace) -> StagedModel:
    """As many stages of each part as there are pipeline ranks, one part's behind the other's."""
    encode, prefill, decode = parts
    points_of_encoder = points_of_decoder = place.split_points
    if place.split_points is not None and len(place.split_points) == 2 * (place.num_stages - 1):
        points_of_encoder, points_of_decoder = _halves(place.split_points)  # of an earlier cut
    encoder = _cut_part(sharded, encode, replace(place, split_points=points_of_encoder))
    first = _cut_part(sharded, prefill, replace(place, split_points=points_of_decoder))
    # Each layer's keys and values must be where prefill has left them.
    others = _cut_part(sharded, decode, replace(place, split_points=first.borders))
    return StagedModel(
        sharded,
        stages=encoder.stages + first.stages + others.stages,
        borders=encoder.borders + first.borders,
        costs=first.costs,
        ends=tuple(number * place.num_stages - 1 for number in range(1, len(parts) + 1)),
        kept={**prefill.kept, **decode.kept},
    )


def _halves(points: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return points[: len(points) // 2], points[len(points) // 2 :]


def _cut_part(sharded: ShardedModel, part: TracedPart, place: PipelinePlace) -> StagedModel:
    staged = cut_into_stages(sharded, part.traced, place, found=part.layers)
    stages = []
    for stage in staged.stages:
        own = set(stage.nodes)
        stages.append(replace(stage, sent=(*stage.sent, *(node for node in part.kept if node in own))))
    return replace(staged, stages=tuple(stages))


def program_of(staged: StagedModel, place: PipelinePlace, sources: Sources) -> RankProgram:
    """What the rank at `place` computes and holds."""
    model = staged.sharded.model
    own = staged.stages[place.rank :: place.num_ranks]
    plan, whole_plan = staged.plan_of(own), staged.plan_of(staged.stages)
    ends = [staged.stages[number] for number in staged.ends]
    return RankProgram(
        architecture=type(model).__name__,
        dtype=model.dtype,
        plan=plan,
        whole_plan=whole_plan,
        stages=tuple(_write(stage, staged.kept) for stage in own),
        inputs_by_stage=tuple(tuple(dict.fromkeys(stage.inputs.values())) for stage in staged.stages),
        outputs=tuple(end.crossings[node] for end in ends for node in end.sent if node not in staged.kept),
        sites_of_ranks=tuple(
            tuple(site for stage in staged.stages[rank :: place.num_ranks] for site in stage.sites)
            for rank in range(place.num_ranks)
        ),
        kv_elements_of_ranks=tuple(
            _most_kv_elements(plan, [site for stage in staged.stages[rank :: place.num_ranks] for site in stage.sites])
            for rank in range(place.num_ranks)
        ),
        bytes_of_ranks=tuple(
            _most_bytes(staged.plan_of(staged.stages[rank :: place.num_ranks])) for rank in range(place.num_ranks)
        ),
        head=_head(model, whole_plan),
        max_positions=max_positions_of(model.config),
        changing_rope=_changing_rope(model.config),
        sources={name: sources[name] for name in plan.parameters if name in sources},
        buffers=_buffers(model, own, plan),
        untied=staged.sharded.untied,
        stored_names=_stored_names(whole_plan, sources),
    )


def _stored_names(plan: TensorParallelPlan, sources: Sources) -> dict[str, str | None]:
    """Parameter, by each of its names → the stored tensor that alone fills it; None where it is tied to another."""
    found: dict[str, str | None] = {}
    for name, entry in plan.parameters.items():
        own = sources.get(name, ())
        if len(own) == 1 and own[0].stored.shape == entry.shape:
            found |= dict.fromkeys((name, *entry.aliases), None if entry.aliases else own[0].stored.name)
    return found


def _write(stage: StageGraph, kept: Mapping[Node, str]) -> StageCode:
    return replace(write_stage(stage), kept=tuple(kept[node] for node in stage.sent if node in kept))


def _most_bytes(plan: TensorParallelPlan) -> int:
    return max(plan.local_bytes(rank) for rank in range(plan.size))


def _most_kv_elements(plan: TensorParallelPlan, sites: Sequence[AttentionSite]) -> int:
    return max(plan.kv_elements_per_token(sites, rank) for rank in range(plan.size))


def _head(model: PreTrainedModel, plan: TensorParallelPlan) -> str | None:
    output = model.get_output_embeddings()
    modules = (name for name, module in model.named_modules() if output is not None and module is output)
    weight = f"{next(modules, '')}.weight"
    return next((name for name, entry in plan.parameters.items() if weight in (name, *entry.aliases)), None)


def _changing_rope(config: PretrainedConfig) -> tuple[str, int] | None:
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    of_layers = [own for own in rope.values() if isinstance(own, dict)]  # where each type of layer has its own
    changing = [
        (own["rope_type"], own.get("original_max_position_embeddings") or text.max_position_embeddings)
        for own in (rope, *of_layers)
        if own.get("rope_type") in LENGTH_DEPENDENT_ROPE
    ]
    return min(changing, key=lambda found: found[1], default=None)


def _buffers(model: PreTrainedModel, stages: Sequence[StageGraph], plan: TensorParallelPlan) -> dict[str, torch.Tensor]:
    """The values of what the stages read and no checkpoint has."""
    planned = {alias for entry in plan.parameters.values() for alias in (entry.name, *entry.aliases)}
    names = {name for stage in stages for name in stage.tensors.values()} - planned
    materialise(model, torch.device("cpu"), names)
    tensors = all_tensors(model)
    return {name: tensors[name].detach().clone() for name in sorted(names)}


def all_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under all its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)


def build_eager_model(
    folder: Path,
    dtype: str,
    group: TensorParallelGroup,
    device: torch.device,
    *,
    settings: Path | None = None,
    expert_parallel: bool = False,
) -> RankModel:
    """This rank's part of a causal language model that runs its own modules: to find out whether a trace is at fault.

    Args:
        settings: folder of the model's configuration, where it is neither `folder` nor the one above.

    Raises:
        CheckpointError: the folder's files do not hold the model that its config.json describes.
        PlanError: the model cannot be split as asked.
    """
    refuse_quantized(folder, settings)
    config, index = read_model_config(settings or folder), read_index(folder, settings)
    sharded = shard_causal_lm(config, choose_dtype(dtype, config), group, expert_parallel, index)
    refuse_strangers(sharded.model, index)
    program = eager_program(sharded)
    sources = match_checkpoint(sharded.model, sharded.plan, index)
    materialise(sharded.model, device)
    started = time.perf_counter()
    tensors = all_tensors(sharded.model)
    load_tensors(load_items(tensors, sharded.plan, sources, group.rank), load_progress(group))
    return RankModel(program, tensors, time.perf_counter() - started, sharded.model)


def eager_program(sharded: ShardedModel) -> RankProgram:
    """The facts of a model whose own modules run; it has no stages."""
    model, plan = sharded.model, sharded.plan
    sites = find_attention_sites(model)
    return RankProgram(
        architecture=type(model).__name__,
        dtype=model.dtype,
        plan=plan,
        whole_plan=plan,
        stages=(),
        inputs_by_stage=(),
        outputs=(),
        sites_of_ranks=(sites,),
        kv_elements_of_ranks=(_most_kv_elements(plan, sites),),
        bytes_of_ranks=(_most_bytes(plan),),
        head=_head(model, plan),
        max_positions=max_positions_of(model.config),
        changing_rope=_changing_rope(model.config),
    )


def num_layers_of(config: PretrainedConfig) -> int:
    """How many layers the model has; 0 where its config names no number."""
    return int(getattr(config.get_text_config(), "num_hidden_layers", 0))
