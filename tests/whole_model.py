"""A traced model's stages, run one after another in this process on one whole sequence, beside the plain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from families import random_model
from transformers import PretrainedConfig, PreTrainedModel

from ts_parallel.checkpoint.index import read_index
from ts_parallel.partition.build import StagedModel, all_tensors, cut_causal_lm, shard_causal_lm
from ts_parallel.partition.graph.stage_code import write_stage
from ts_parallel.partition.graph.stages import StageGraph
from ts_parallel.partition.graph.trace import TracedGroup
from ts_parallel.partition.load import RankModel, load_program
from ts_parallel.partition.prepared import prepare_program
from ts_parallel.partition.program import (
    ONE_STAGE,
    POSITIONS,
    ROWS,
    TOKEN_IDS,
    AttentionSite,
    PipelinePlace,
    ProgramRequest,
)
from ts_parallel.runtime.backends.choose import choose_backend
from ts_parallel.runtime.backends.torch.backend import TorchBackend
from ts_parallel.runtime.backends.torch.norms import rotary
from ts_parallel.runtime.runner import Runner
from ts_parallel.runtime.stage import Stage
from ts_parallel.topology import TensorParallelGroup, Topology

ALONE = TracedGroup(0, 1)


class EagerAttention:
    """A stage's attention calls on one sequence, computed as transformers' own `eager` implementation does."""

    def __init__(self, sites: Sequence[AttentionSite]) -> None:
        self._sites = sites

    def __call__(
        self,
        step: None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: int,
        sinks: None = None,
        cosine: torch.Tensor | None = None,
        sine: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if cosine is not None and sine is not None:
            query, key = rotary(query, cosine, sine), rotary(key, cosine, sine)
        own, length, groups = self._sites[site], query.shape[2], query.shape[1] // key.shape[1]
        assert (own.num_heads, own.num_kv_heads) == (query.shape[1], key.shape[1])
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        scores = query @ key.mT * own.scaling
        if own.softcap is not None:
            scores = torch.tanh(scores / own.softcap) * own.softcap
        distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
        is_seen = (distance >= 0) & (distance < (own.window or length))
        mask = torch.zeros(length, length, dtype=scores.dtype).masked_fill(~is_seen, torch.finfo(scores.dtype).min)
        weights = (scores + mask).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous()


def stage_model(config: PretrainedConfig, num_stages: int = 1, dtype: torch.dtype = torch.float32) -> StagedModel:
    sharded = shard_causal_lm(config, dtype, ALONE)
    return cut_causal_lm(sharded, PipelinePlace(num_ranks=num_stages))


def build_rank_model(
    folder: Path,
    dtype: str,
    group: TensorParallelGroup,
    device: torch.device,
    place: PipelinePlace = ONE_STAGE,
    task: str | None = None,
    packs: bool = False,
) -> RankModel:
    """This rank's part of the checkpoint in `folder`."""
    index = read_index(folder)
    request = ProgramRequest(folder, dtype, group.rank, group.size, place, task)
    program = prepare_program(request, index)
    layout = choose_backend(device, program.dtype).weights if packs else None
    return load_program(program, index, group, device, layout)


def runner_of(part: RankModel, topology: Topology, block_size: int, kv_cache_bytes: int, max_model_len: int) -> Runner:
    """A runner with the backend that a server would have here."""
    backend = choose_backend(topology.device, part.program.dtype, topology.num_threads)
    sizes = {"block_size": block_size, "kv_cache_bytes": kv_cache_bytes, "max_model_len": max_model_len}
    return Runner(part, topology, backend, **sizes)


def sequence(length: int, vocabulary: int = 97, seed: int = 0) -> dict[str, torch.Tensor]:
    """The model inputs of one sequence of which all logits are wanted."""
    token_ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))
    return {TOKEN_IDS: token_ids, POSITIONS: torch.arange(length).unsqueeze(0), ROWS: torch.arange(length)}


@torch.inference_mode()
def run_stages(
    stages: Sequence[StageGraph], tensors: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The last one's output, each stage made of no more than what it says that it needs."""
    sizes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    carried: list[torch.Tensor] = []
    for graph in stages:
        own = {name: tensors[name] for name in graph.tensors.values()}
        stage = Stage(write_stage(graph), own, ALONE, TorchBackend(), EagerAttention(graph.sites))
        assert [(tuple(tensor.shape), tensor.dtype) for tensor in carried] == [
            (crossing.shape(sizes), crossing.dtype) for crossing in stage.received
        ]
        carried = stage(None, {name: inputs[name] for name in stage.inputs}, carried)
    (output,) = carried
    return output


def plain_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Random weights in float32, transformers' own attention."""
    model = random_model(config, seed).eval()
    model.set_attn_implementation("eager")
    return model


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(token_ids, use_cache=False).logits
    return logits


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in all_tensors(model).items()}
