"""A decoder layer's attention and its feed-forward, and many in a row, as their parts one after another.

Whatever backend made the parts: each is the callable that `Backend` describes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ts_parallel.partition.program import AttentionSublayer
from ts_parallel.runtime.backends.base import Sublayer, Sums


def gated_sublayer(norm: Callable[..., Any], gated: Callable[..., Any], last: Callable[..., Any]) -> Sublayer:
    """See `Backend.make_gated_sublayer`."""

    def run(hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = last(gated(norm(hidden)), residual)
        return product

    return run


def attention_sublayer(
    entry: AttentionSublayer,
    norm: Callable[..., Any],
    linears: Callable[..., Any],
    last: Callable[..., Any],
    attention: Any,
) -> Sublayer:
    """See `Backend.make_attention_sublayer`."""
    widths = (entry.head_dim, entry.head_dim, entry.value_dim)

    def run(
        step: Any, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        parts = zip(linears(norm(hidden)), widths, strict=True)
        heads = [part.view(*part.shape[:-1], -1, width).transpose(1, 2) for part, width in parts]
        found = attention(step, *heads, entry.site, None, cosine, sine)
        product: torch.Tensor = last(found.reshape(*found.shape[:2], -1), residual)
        return product

    return run


def stack(parts: Sequence[tuple[bool, Sublayer]], sums: Sums | None) -> Sublayer:
    """See `Backend.make_stack`.

    Args:
        parts: the sublayers, each with whether it is an attention's.
        sums: of the ranks over which what a part gives has to be summed; None: it is whole.
    """

    def run(step: Any, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        for is_attention, part in parts:
            arguments = (step, hidden, cosine, sine) if is_attention else (hidden,)
            if sums is None:
                hidden = part(*arguments, hidden)
            else:
                hidden = hidden + sums.all_reduce(part(*arguments))
        return hidden

    return run
