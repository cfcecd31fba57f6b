"""A row of sublayers, in which what each gives is added where the next one takes its norm: ten launches a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ts_parallel.partition.program import AttentionSublayer
from ts_parallel.runtime.backends.base import Sublayer, Sums
from ts_parallel.runtime.backends.cuda.norms import AddNorm

Inner = Callable[..., torch.Tensor]
"""The step, what a sublayer's norm gives, and the angles' cosine and sine → what the sublayer adds."""


def attention_inner(
    entry: AttentionSublayer, linears: Callable[..., Any], last: Callable[..., Any], attention: Any
) -> Inner:
    """An attention sublayer behind its norm."""
    widths = (entry.head_dim, entry.head_dim, entry.value_dim)

    def run(step: Any, normed: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        parts = zip(linears(normed), widths, strict=True)
        heads = [part.view(*part.shape[:-1], -1, width).transpose(1, 2) for part, width in parts]
        found = attention(step, *heads, entry.site, None, cosine, sine)
        product: torch.Tensor = last(found.view(*found.shape[:2], -1))
        return product

    return run


def gated_inner(gated: Callable[..., Any], last: Callable[..., Any]) -> Inner:
    """A gated sublayer behind its norm."""

    def run(step: Any, normed: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = last(gated(normed))
        return product

    return run


def stack(parts: Sequence[tuple[AddNorm, Inner]], sums: Sums | None) -> Sublayer:
    """See `Backend.make_stack`.

    Args:
        sums: of the ranks over which what a part gives has to be summed; None: it is whole.
    """

    def run(step: Any, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        given: torch.Tensor | None = None
        for add_norm, inner in parts:
            hidden, normed = add_norm(hidden, given)
            given = inner(step, normed, cosine, sine)
            if sums is not None:
                given = sums.all_reduce(given)
        assert given is not None
        return hidden + given

    return run
