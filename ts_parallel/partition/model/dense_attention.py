"""Attention of models that see all their tokens at once: encoders, image and text classifiers.

Nothing is paged there, so a trace records scaled dot-product attention itself, with the mask that transformers makes.
Registered under a name of its own so that the attention calls can be counted and measured before the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ts_parallel.errors import PlanError
from ts_parallel.partition.graph.trace import InputSpec
from ts_parallel.partition.model.attention_sites import site_of_call
from ts_parallel.partition.program import AttentionSite

IMPLEMENTATION = "ts_parallel_dense"

Note = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], None]


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """The registered attention function; its signature is transformers'."""
    note: Note | None = getattr(module, "note_attention", None)
    if note is not None:
        note(module, query, key, value)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


def _mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
    """The registered mask function. A mask is never left out: whether it could be depends on data."""
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*arguments, **{**options, **skips})  # type: ignore[no-any-return]


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def find_dense_sites(
    model: PreTrainedModel,
    call: Callable[[Mapping[str, torch.Tensor]], object],
    inputs: Mapping[str, InputSpec],
    least: Mapping[str, int] | None = None,
) -> tuple[AttentionSite, ...]:
    """The attention calls that `call` makes in the deferred `model`, in call order.

    Args:
        least: the smallest value of each letter of the inputs' sizes, where that is not 1.

    Raises:
        PlanError: it cannot run without data.
    """
    names = {module: name for name, module in model.named_modules()}
    sites: list[AttentionSite] = []

    def note(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        sites.append(site_of_call(names[module], query, key, value))

    known = least or {}
    examples = {
        name: torch.zeros(
            [size if isinstance(size, int) else max(2, known.get(size, 1)) for size in spec.sizes],
            dtype=spec.dtype,
            device="meta",
        )
        for name, spec in inputs.items()
    }
    for module in names:
        module.note_attention = note
    try:
        with torch.no_grad():
            call(examples)
    except Exception as error:
        raise PlanError(f"{type(model).__name__} cannot run without data: {type(error).__name__}: {error}") from error
    finally:
        for module in names:
            del module.note_attention
    return tuple(sites)
