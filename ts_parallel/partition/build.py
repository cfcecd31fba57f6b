"""How a weight reaches its device, on one screen."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ts_parallel.checkpoint.index import CheckpointIndex, StoredTensor, read_index
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.errors import CheckpointError
from ts_parallel.partition.attention_sites import AttentionSite, find_attention_sites
from ts_parallel.partition.deferred import build_deferred, choose_dtype, materialise, read_model_config
from ts_parallel.partition.plan import TensorParallelPlan, plan_tensor_parallel
from ts_parallel.partition.shard import apply_tensor_parallel
from ts_parallel.topology import TensorParallelGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankModel:
    """One rank's part of a model. `sites` are its attention calls, with the heads that it has."""

    model: PreTrainedModel
    plan: TensorParallelPlan
    sites: tuple[AttentionSite, ...]
    seconds: float = 0.0
    """What reading its weights took."""


def build_rank_model(folder: Path, dtype: str, group: TensorParallelGroup, device: torch.device) -> RankModel:
    """This rank's part of the checkpoint in `folder`, ready to run: the way of a weight from file to device.

    Raises:
        CheckpointError: the folder's files do not hold the model that its config.json describes.
        PlanError: the model cannot be split over `group.size` ranks.
    """
    config = read_model_config(folder)
    index = read_index(folder)
    part = shard_deferred(config, choose_dtype(dtype, config), group)
    sources = match_checkpoint(part.model, part.plan, index)
    materialise(part.model, device)
    tensors = part.model.state_dict(keep_vars=True)
    items = [
        LoadItem(tensors[name].detach(), source, entry.slices[group.rank] if entry.slices else None)
        for name, entry in part.plan.parameters.items()
        if (source := sources[name])
    ]
    started = time.perf_counter()
    load_tensors(items, Progress(f"loading rank {group.rank} of {group.size}", is_shown=group.rank == 0))
    return replace(part, seconds=time.perf_counter() - started)


def shard_deferred(config: PretrainedConfig, dtype: torch.dtype, group: TensorParallelGroup) -> RankModel:
    """This rank's part of the model, planned and sharded, without any weight in memory."""
    model = build_deferred(config, dtype)
    plan = plan_tensor_parallel(model, find_attention_sites(model), group.size)
    if group.size > 1:
        apply_tensor_parallel(model, plan, group)
    return RankModel(model, plan, find_attention_sites(model))


def match_checkpoint(
    model: PreTrainedModel, plan: TensorParallelPlan, index: CheckpointIndex
) -> dict[str, StoredTensor]:
    """Each parameter's stored tensor, found under any of its names.

    Raises:
        CheckpointError: one is missing, or has another shape than the model's.
    """
    known = index_by_model_name(model, index)
    found = {
        name: next((known[alias] for alias in (name, *entry.aliases) if alias in known), None)
        for name, entry in plan.parameters.items()
    }
    missing = [name for name, stored in found.items() if stored is None]
    if missing:
        more = f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise CheckpointError(f"the checkpoint has no tensor for {missing[0]!r}{more} of {type(model).__name__}")
    sources = {name: stored for name, stored in found.items() if stored is not None}
    for name, stored in sources.items():
        expected = plan.parameters[name].shape
        if stored.shape != expected:
            raise CheckpointError(f"{name!r} has shape {list(stored.shape)} in {stored.file}, not {list(expected)}")
    unused = len(index) - len({stored.name for stored in sources.values()})
    if unused:
        logger.info("%d tensors of the checkpoint belong to no parameter of %s", unused, type(model).__name__)
    return sources


def index_by_model_name(model: PreTrainedModel, index: CheckpointIndex) -> dict[str, StoredTensor]:
    """The index under the names that this version of transformers gives the model's parameters: older checkpoints have
    other names for some, and a checkpoint of the base model alone lacks its prefix."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    parameters = model.state_dict()
    return {
        rename_source_key(name, renamings, [], model.base_model_prefix, parameters)[0]: stored
        for name, stored in index.items()
    }
