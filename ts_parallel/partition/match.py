"""Which bytes of a checkpoint make up which parameter: under its name or an older one, or in several tensors.

What transformers stacks and joins after reading (a mixture's experts, stored one by one) is read straight to its place
instead, so that a rank reads only what it keeps; and so are the rows of what it takes apart (queries, keys and values
that are stored as one). Parameters that the configuration ties, and the checkpoint holds with values of their own, are
untied, as transformers does. Knows no file and no device.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ts_parallel.checkpoint.codes.compare import hold_the_same
from ts_parallel.checkpoint.index import CheckpointIndex, StoredTensor
from ts_parallel.errors import CheckpointError
from ts_parallel.partition.program import ParameterPlan, Source, Sources, TensorParallelPlan

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"\d+")
# Models of text and images have their text model in a module of this name.
_TEXT_MODEL = re.compile(r"(^|\.)language_model(?=\.)")


def match_checkpoint(model: PreTrainedModel, plan: TensorParallelPlan, index: CheckpointIndex) -> Sources:
    """Each parameter's sources, found under any of its names; together they fill it.

    Raises:
        CheckpointError: one is missing, has another shape than the model's, or is made from what is stored by an
            operation other than stacking and joining experts and taking rows; or the checkpoint has more layers than
            the model.
    """
    direct, converted = index_by_model_name(model, index)
    chunks = _chunks_by_name(converted)
    sources: dict[str, tuple[Source, ...]] = {}
    missing = []
    for name, entry in plan.parameters.items():
        names = (name, *entry.aliases)
        stored = next((direct[alias] for alias in names if alias in direct), None)
        chunk = next((chunks[alias] for alias in names if alias in chunks), None)
        parts = next((converted[alias] for alias in names if alias in converted), None)
        if stored is not None:
            sources[name] = (_whole(entry, stored),)
        elif chunk is not None:
            sources[name] = (_rows(entry, chunk),)
        elif parts is not None:
            sources[name] = _joined(entry, parts)
        else:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise CheckpointError(f"the checkpoint has no tensor for {missing[0]!r}{more} of {type(model).__name__}")
    _refuse_further_layers(model, [*direct, *converted])
    unused = len(index) - len({own.stored.name for part in sources.values() for own in part})
    if unused:
        logger.info("%d tensors of the checkpoint belong to no parameter of %s", unused, type(model).__name__)
    return sources


def untie(model: PreTrainedModel, index: CheckpointIndex) -> tuple[str, ...]:
    """Give each parameter of a deferred `model` that is tied to another, and stored with other values, its own memory.

    As transformers does: where both are stored, it ties them only if they are equal in the dtype that runs. The others
    are one parameter, whichever of their names is stored.

    Returns:
        the names of those that are not tied any more.

    Raises:
        CheckpointError: what is stored cannot be read.
    """
    if not index:
        return ()
    stored, _ = index_by_model_name(model, index)
    untied = []
    for target, source in list((getattr(model, "all_tied_weights_keys", None) or {}).items()):
        if target in stored and source in stored:
            if not hold_the_same(stored[target], stored[source], model.get_parameter_or_buffer(target).dtype):
                _untie(model, target)
                untied.append(target)
        elif target in stored or source in stored:
            stored[target] = stored[source] = stored.get(target) or stored[source]
    return tuple(untied)


def _untie(model: PreTrainedModel, name: str) -> None:
    owner, _, own = name.rpartition(".")
    tensor = torch.empty_like(model.get_parameter_or_buffer(name))
    model.get_submodule(owner).register_parameter(own, nn.Parameter(tensor, requires_grad=False))
    model.all_tied_weights_keys.pop(name)


@dataclass(frozen=True)
class _Parts:
    """The stored tensors that `converter` makes one parameter of, by its source patterns, in the order of its list."""

    converter: WeightConverter
    by_pattern: Mapping[str, list[StoredTensor]]


def index_by_model_name(
    model: PreTrainedModel, index: CheckpointIndex
) -> tuple[dict[str, StoredTensor], dict[str, _Parts]]:
    """The index under the names that this version of transformers gives the model's parameters: older checkpoints have
    other names for some, a checkpoint of the base model alone lacks its prefix, and one of text and images has a
    module around the text model. Apart from them, by the first name that it would have, what a converter would have to
    work on."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    parameters = model.state_dict()
    is_text_model = not any(_TEXT_MODEL.search(name) for name in parameters)
    direct: dict[str, StoredTensor] = {}
    groups: dict[str, dict[str, list[StoredTensor]]] = defaultdict(lambda: defaultdict(list))
    for old_name in sorted(index, key=dot_natural_key):  # transformers' order: expert 10 after expert 9
        name, pattern = rename_source_key(old_name, renamings, converters, model.base_model_prefix, parameters)
        if is_text_model and name not in parameters and _TEXT_MODEL.search(old_name):
            inner = _TEXT_MODEL.sub("", old_name, count=1).lstrip(".")
            if inner not in index:
                name, pattern = rename_source_key(inner, renamings, converters, model.base_model_prefix, parameters)
                if name in direct:
                    continue  # of a tower that is not served
        if pattern is None:
            direct[name] = index[old_name]
        else:
            groups[name][pattern].append(index[old_name])
    converted = {name: _Parts(converter_of[next(iter(found))], found) for name, found in groups.items()}
    return direct, converted


def _refuse_further_layers(model: PreTrainedModel, names: Sequence[str]) -> None:
    """What is stored may be more than a model reads, as old buffers are; but not layers or experts beyond its last."""
    own = model.state_dict().keys()
    known = {_NUMBER.sub("#", name) for name in own}
    ignored = tuple(model._keys_to_ignore_on_load_unexpected or ())
    for name in names:
        if name in own or _NUMBER.sub("#", name) not in known or any(re.search(pattern, name) for pattern in ignored):
            continue
        raise CheckpointError(
            f"the checkpoint has {name!r}, for which {type(model).__name__} has no place: config.json describes fewer "
            "layers or experts than are stored"
        )


def _whole(entry: ParameterPlan, stored: StoredTensor) -> Source:
    if stored.shape == (0,) != entry.shape:
        raise CheckpointError(
            f"{stored.name!r} in {stored.file} is empty, as DeepSpeed's ZeRO-3 leaves it where it does not gather: run "
            "its `zero_to_fp32.py`, or save with stage3_gather_16bit_weights_on_model_save"
        )
    if stored.shape != entry.shape:
        raise CheckpointError(
            f"{entry.name!r} has shape {list(stored.shape)} in {stored.file}, not {list(entry.shape)}"
        )
    return Source(stored, (0,) * len(entry.shape))


@dataclass(frozen=True)
class _Chunk:
    """One of `count` equal parts of a stored tensor's rows."""

    stored: StoredTensor
    number: int
    count: int


def _chunks_by_name(converted: Mapping[str, _Parts]) -> dict[str, _Chunk]:
    """What is stored as rows of one tensor, under the model's names; `converted` has it under the first of them."""
    found = {}
    for name, parts in converted.items():
        targets, operations = parts.converter.target_patterns, parts.converter.operations
        stored = [own for stack in parts.by_pattern.values() for own in stack]
        only = operations[0] if len(operations) == 1 else None
        if not isinstance(only, Chunk) or only.dim != 0 or only.num_shards_attribute is not None:
            continue
        if len(stored) == 1 and targets[0] in name:
            for number, target in enumerate(targets):
                found[name.replace(targets[0], target, 1)] = _Chunk(stored[0], number, len(targets))
    return found


def _rows(entry: ParameterPlan, chunk: _Chunk) -> Source:
    stored, length = chunk.stored, entry.shape[0] if entry.shape else 0
    if stored.shape != (chunk.count * length, *entry.shape[1:]):
        raise CheckpointError(
            f"{stored.name!r} has shape {list(stored.shape)} in {stored.file}, of which {entry.name!r} of shape "
            f"{list(entry.shape)} is one of {chunk.count} parts"
        )
    return Source(stored, (0,) * len(entry.shape), (chunk.number * length, length))


def _joined(entry: ParameterPlan, parts: _Parts) -> tuple[Source, ...]:
    """Experts on dim 0, each one's patterns (gate, then up) one after the other on dim 1."""
    _refuse_other_operations(entry, parts.converter)
    sources = []
    begin = 0
    for pattern in parts.converter.source_patterns:
        stack = parts.by_pattern.get(pattern, [])
        if len(stack) != entry.shape[0]:
            raise CheckpointError(
                f"{entry.name!r} is a stack of {entry.shape[0]} tensors like {pattern!r}, "
                f"the checkpoint has {len(stack)}"
            )
        rows = stack[0].shape[0] if stack[0].shape else 0
        for stored in stack:
            if len(stored.shape) != len(entry.shape) - 1 or stored.shape != (rows, *entry.shape[2:]):
                raise CheckpointError(
                    f"{stored.name!r} has shape {list(stored.shape)} in {stored.file}, which does not fit into "
                    f"{entry.name!r} of shape {list(entry.shape)}"
                )
        sources += [Source(stored, (row, begin, *(0,) * len(entry.shape[2:]))) for row, stored in enumerate(stack)]
        begin += rows
    if begin != entry.shape[1]:
        raise CheckpointError(
            f"the stored parts of {entry.name!r} have {begin} rows for each of dim 0, not {entry.shape[1]}"
        )
    return tuple(sources)


def _refuse_other_operations(entry: ParameterPlan, converter: WeightConverter) -> None:
    """Only stacking on dim 0, and after it joining on dim 1, need no more than the right place for each byte."""
    for operation, known in zip_longest(converter.operations, ((MergeModulelist, 0), (Concatenate, 1))):
        if operation is None or (known and isinstance(operation, known[0]) and operation.dim == known[1]):
            continue
        raise CheckpointError(
            f"{entry.name!r} would have to be made of {converter.source_patterns[0]!r} by {operation!r}; only "
            "experts can be stacked and joined, and rows taken, while they are read"
        )
