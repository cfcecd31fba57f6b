"""A decoder layer's attention and its feed-forward as one call each, and many in a row as one.

The kernels do all of it without coming back in between, and give each number the same roundings as its parts alone.
Where they cannot, the parts are called one after another. Which there are: `partition.graph.sublayers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ts_parallel.native import kernels
from ts_parallel.partition.program import AttentionSublayer, GatedSublayer, RmsNorm, SublayerStack
from ts_parallel.runtime.backends.base import Sublayer, Sums, Tensors
from ts_parallel.runtime.backends.native.attention import KernelAttention
from ts_parallel.runtime.backends.native.linears import layer_of, make_linears
from ts_parallel.runtime.backends.native.norms import are_angles_for_kernels, is_for_kernels, make_norm
from ts_parallel.runtime.backends.torch import sublayers as in_parts
from ts_parallel.topology import TensorParallelGroup


def make_gated_sublayer(entry: GatedSublayer, tensors: Tensors) -> Sublayer:
    """See `Backend.make_gated_sublayer`."""
    weight = tensors[entry.norm.weight]
    norm, gated, last = (
        make_norm(entry.norm, weight),
        make_linears(entry.gated, tensors),
        make_linears(entry.last, tensors),
    )
    plain = in_parts.gated_sublayer(norm, gated, last)
    sublayer = _make_sublayer(entry.norm, weight, gated, last)
    if sublayer is None:
        return plain
    num_outputs = int(tensors[entry.last.weight].shape[0])

    def run(hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if hidden.dtype != torch.bfloat16:  # some families keep their residual stream in float32
            return plain(hidden, residual)
        return _run(sublayer, None, (0, 0), hidden, residual, num_outputs)

    run.native = sublayer  # type: ignore[attr-defined]
    return run


def make_attention_sublayer(entry: AttentionSublayer, tensors: Tensors, attention: Any) -> Sublayer:
    """See `Backend.make_attention_sublayer`."""
    weight = tensors[entry.norm.weight]
    norm = make_norm(entry.norm, weight)
    linears, last = make_linears(entry.linears, tensors), make_linears(entry.last, tensors)
    plain = in_parts.attention_sublayer(entry, norm, linears, last, attention)
    site = attention.site(entry.site) if isinstance(attention, KernelAttention) else None
    sublayer = None if site is None else _make_sublayer(entry.norm, weight, linears, last, site)
    if sublayer is None:
        return plain
    num_outputs, head_dim = int(tensors[entry.last.weight].shape[0]), entry.head_dim

    def run(
        step: Any, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        if hidden.dtype != torch.bfloat16 or not are_angles_for_kernels(cosine, sine, hidden.shape[1], head_dim):
            return plain(step, hidden, cosine, sine, residual)
        return _run(sublayer, step.step, (cosine.data_ptr(), sine.data_ptr()), hidden, residual, num_outputs)

    run.native = sublayer  # type: ignore[attr-defined]
    return run


def make_stack(
    entry: SublayerStack, tensors: Tensors, attention: Any, group: TensorParallelGroup, sums: Sums
) -> Sublayer:
    """See `Backend.make_stack`."""
    parts: list[tuple[bool, Sublayer]] = []
    for part in entry.sublayers:
        if isinstance(part, AttentionSublayer):
            parts.append((True, make_attention_sublayer(part, tensors, attention)))
        else:
            parts.append((False, make_gated_sublayer(part, tensors)))

    # `run` keeps this, and with it the parts, whose addresses the kernels' descriptions hold.
    plain = in_parts.stack(parts, sums if entry.are_parts else None)
    sublayers = tuple(getattr(part, "native", None) for _, part in parts)
    team = group.team.for_kernels if entry.are_parts and group.team is not None else None
    if None in sublayers or (entry.are_parts and team is None):
        return plain
    head_dim = next(part.head_dim for part in entry.sublayers if isinstance(part, AttentionSublayer))

    def run(step: Any, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        num_tokens = hidden.shape[1]
        if hidden.dtype != torch.bfloat16 or not are_angles_for_kernels(cosine, sine, num_tokens, head_dim):
            return plain(step, hidden, cosine, sine)
        hidden = hidden.contiguous()
        output = torch.empty_like(hidden)
        places = (cosine.data_ptr(), sine.data_ptr(), hidden.data_ptr())
        kernels.run_stack(sublayers, step.step, *places, num_tokens, output.data_ptr(), team)
        return output

    return run


def _make_sublayer(
    norm: RmsNorm, weight: torch.Tensor, first: Callable[..., Any], last: Callable[..., Any], site: Any = None
) -> Any:
    """The kernels' own description, which holds addresses: whoever has it keeps the parts. None where it cannot be."""
    if layer_of(first) is None or layer_of(last) is None or not is_for_kernels(weight):
        return None
    return kernels.make_sublayer(weight.data_ptr(), norm.is_offset, norm.epsilon, layer_of(first), layer_of(last), site)


def _run(
    sublayer: Any,
    step: Any,
    angles: tuple[int, int],
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    num_outputs: int,
) -> torch.Tensor:
    hidden = hidden.contiguous()
    *sizes, width = hidden.shape
    output = hidden.new_empty((*sizes, num_outputs))
    added = 0
    if residual is not None:
        residual = residual.contiguous()
        added = residual.data_ptr()
    kernels.run_sublayer(sublayer, step, *angles, hidden.data_ptr(), hidden.numel() // width, added, output.data_ptr())
    return output
