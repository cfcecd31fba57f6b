"""What a checkpoint holds for a part of the model that has no place for it, found out from names and dtypes alone.

A stored tensor that nobody reads is harmless where it belongs to something else: another head, a tower of a model of
images, what old versions of transformers saved and now compute. Within the model's own layers and beside its own
weights it changes what those weights mean, as a scale does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from torch import nn
from transformers import PreTrainedModel

from ts_parallel.checkpoint.index import CheckpointIndex, StoredTensor
from ts_parallel.checkpoint.quantized import NOT_READ, PLAIN_DTYPES, format_of
from ts_parallel.errors import CheckpointError
from ts_parallel.partition.match import index_by_model_name

# What models once saved with their weights and compute by now, or have for training alone. transformers' classes name
# some of it, each for its own family.
_HARMLESS = re.compile(
    r"(.+\.)?("
    r"(original_)?inv_freq|(cos|sin)_cached|position_ids|token_type_ids|relative_position_index|attn_mask|causal_mask"
    r"|num_batches_tracked|(attn|attention)\.bias|(attn\.|attention\.|attn)?masked_bias"
    r"|EncDecAttention\.relative_attention_bias\.weight)"
)


def refuse_strangers(model: PreTrainedModel, index: CheckpointIndex) -> None:
    """Look through the index for what `model`, sharded or whole, would be read without, or read as what it is not.

    Raises:
        CheckpointError: a tensor stands in one of its layers, or beside one of its weights, and is none of them; or a
            weight's numbers are stored as codes.
    """
    found = list(_by_name(model, index))
    own = {**model.state_dict(), **dict(model.named_buffers())}
    strangers = [(stored, home) for name, stored in found if (home := _home_of_stranger(name, model, own))]
    kind = type(model).__name__
    for stored, _ in strangers:
        if (quantised := format_of(stored.name)) is not None:
            raise CheckpointError(
                f"{stored.file} holds {stored.name!r}, which quantised weights have ({quantised}): {NOT_READ}"
            )
    for name, stored in found:
        if name in own and own[name].is_floating_point() and stored.dtype not in PLAIN_DTYPES:
            dtype = str(stored.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{stored.name!r} in {stored.file} is {dtype} where {kind} has weights, so it is quantised: {NOT_READ}"
            )
    for stored, home in strangers:
        raise CheckpointError(
            f"{stored.file} holds {stored.name!r}, for which {home!r} of {kind} has no place, and what it changes "
            "would be lost: serve the config.json that these weights were saved with, or weights without it"
        )
    _refuse_scales_anywhere(found, own)


def _by_name(model: PreTrainedModel, index: CheckpointIndex) -> Iterator[tuple[str, StoredTensor]]:
    """Each stored tensor under the model's name for it."""
    direct, converted = index_by_model_name(model, index)
    yield from direct.items()
    for name, parts in converted.items():
        yield from ((name, stored) for own in parts.by_pattern.values() for stored in own)


def _home_of_stranger(name: str, model: PreTrainedModel, own: Collection[str]) -> str | None:
    """The innermost module that has no place for the tensor which stands in it; None where it is at home or harmless.

    A module has its place for everything where it is a layer, or in one, or where it has weights and no modules.
    """
    prefix = model.base_model_prefix
    names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))  # as that of the base model alone, or not
    if any(each in own for each in names) or _HARMLESS.fullmatch(name):
        return None
    if any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ()):
        return None
    return next(filter(None, (_home(each, model) for each in names)), None)


def _home(name: str, model: PreTrainedModel) -> str | None:
    module: nn.Module = model
    path: list[str] = []
    for word in name.split(".")[:-1]:
        if word not in module._modules or module._modules[word] is None:
            break
        module = module.get_submodule(word)
        path.append(word)
    is_in_layer = any(word.isdecimal() for word in path)
    is_weight = not module._modules and any(True for _ in module.parameters(recurse=False))
    return ".".join(path) if is_in_layer or is_weight else None


def _refuse_scales_anywhere(found: list[tuple[str, StoredTensor]], own: Collection[str]) -> None:
    """Eight bits are codes, not numbers, as soon as there are scales: of whatever name, wherever they stand."""
    weights = (stored for name, stored in found if name in own and stored.dtype.is_floating_point)
    short = next((stored for stored in weights if stored.dtype.itemsize == 1), None)
    scale = next((stored for name, stored in found if name not in own and "scale" in stored.name.lower()), None)
    if short is not None and scale is not None:
        raise CheckpointError(
            f"{short.name!r} in {short.file} has numbers of eight bits, and there is {scale.name!r}: {NOT_READ}"
        )
