"""A decoder layer's attention and its feed-forward as one call each, and many in a row as one.

The kernels do all of it without coming back in between, and give each number the same roundings as its parts alone.
Where they cannot, the parts are called one after another. Which there are: `partition.graph.sublayers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ts_parallel.native import kernels_for
from ts_parallel.partition.program import AttentionSublayer, GatedSublayer, RmsNorm, SublayerStack
from ts_parallel.runtime.backends.base import Sublayer, Sums, Tensors
from ts_parallel.runtime.backends.native.attention import KernelAttention
from ts_parallel.runtime.backends.native.linears import layer_of, make_linears
from ts_parallel.runtime.backends.native.norms import are_angles_for_kernels, is_for_kernels, make_norm
from ts_parallel.runtime.backends.torch import sublayers as in_parts
from ts_parallel.topology import TensorParallelGroup

if TYPE_CHECKING:
    from ts_parallel.native.kernel_calls import Kernels


def make_gated_sublayer(entry: GatedSublayer, tensors: Tensors) -> Sublayer:
    """See `Backend.make_gated_sublayer`."""
    weight = tensors[entry.norm.weight]
    norm, gated, last = (
        make_norm(entry.norm, weight),
        make_linears(entry.gated, tensors),
        make_linears(entry.last, tensors),
    )
    plain = in_parts.gated_sublayer(norm, gated, last)
    sublayer = _make_sublayer(entry.norm, weight, gated, last, tensors[entry.last.weight].shape[0])
    if sublayer is None:
        return plain

    def run(hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if hidden.dtype != sublayer.dtype:  # some families keep their residual stream in float32
            return plain(hidden, residual)
        return sublayer.run(None, (0, 0), hidden, residual)

    run.native = sublayer  # type: ignore[attr-defined]
    return run


def make_attention_sublayer(entry: AttentionSublayer, tensors: Tensors, attention: Any) -> Sublayer:
    """See `Backend.make_attention_sublayer`."""
    weight = tensors[entry.norm.weight]
    norm = make_norm(entry.norm, weight)
    linears, last = make_linears(entry.linears, tensors), make_linears(entry.last, tensors)
    plain = in_parts.attention_sublayer(entry, norm, linears, last, attention)
    is_paged_alike = isinstance(attention, KernelAttention) and attention.dtype == weight.dtype
    site = attention.site(entry.site) if is_paged_alike else None
    num_outputs = tensors[entry.last.weight].shape[0]
    sublayer = _make_sublayer(entry.norm, weight, linears, last, num_outputs, site) if is_paged_alike else None
    if sublayer is None:
        return plain

    def run(
        step: Any, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        are_angles = are_angles_for_kernels(cosine, sine, hidden.shape[1], entry.head_dim, sublayer.dtype)
        if hidden.dtype != sublayer.dtype or not are_angles:
            return plain(step, hidden, cosine, sine, residual)
        return sublayer.run(step.step, (cosine.data_ptr(), sine.data_ptr()), hidden, residual)

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
    own: list[_Sublayer] = [part.native for _, part in parts if hasattr(part, "native")]
    team = group.team.for_kernels if entry.are_parts and group.team is not None else None
    if len(own) < len(parts) or len({sublayer.dtype for sublayer in own}) > 1 or (entry.are_parts and team is None):
        return plain
    sublayers, kernels, dtype = tuple(sublayer.made for sublayer in own), own[0].kernels, own[0].dtype
    head_dim = next(part.head_dim for part in entry.sublayers if isinstance(part, AttentionSublayer))

    def run(step: Any, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        num_tokens = hidden.shape[1]
        if hidden.dtype != dtype or not are_angles_for_kernels(cosine, sine, num_tokens, head_dim, dtype):
            return plain(step, hidden, cosine, sine)
        hidden = hidden.contiguous()
        output = torch.empty_like(hidden)
        places = (cosine.data_ptr(), sine.data_ptr(), hidden.data_ptr())
        kernels.run_stack(sublayers, step.step, *places, num_tokens, output.data_ptr(), team)
        return output

    return run


@dataclass(frozen=True)
class _Sublayer:
    """One that the kernels do as a whole."""

    kernels: Kernels
    dtype: torch.dtype
    made: Any
    """Their own description, which holds addresses: whoever has it keeps the parts."""
    num_outputs: int

    def run(
        self, step: Any, angles: tuple[int, int], hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        hidden = hidden.contiguous()
        *sizes, width = hidden.shape
        output = hidden.new_empty((*sizes, self.num_outputs))
        added = 0
        if residual is not None:
            residual = residual.contiguous()
            added = residual.data_ptr()
        num_tokens = hidden.numel() // width
        self.kernels.run_sublayer(self.made, step, *angles, hidden.data_ptr(), num_tokens, added, output.data_ptr())
        return output


def _make_sublayer(
    norm: RmsNorm,
    weight: torch.Tensor,
    first: Callable[..., Any],
    last: Callable[..., Any],
    num_outputs: int,
    site: Any = None,
) -> _Sublayer | None:
    """None where the kernels cannot do it as a whole."""
    kernels, dtype = kernels_for(weight.dtype), weight.dtype
    layers = layer_of(first, dtype), layer_of(last, dtype)
    if kernels is None or None in layers or not is_for_kernels(weight):
        return None
    made = kernels.make_sublayer(weight.data_ptr(), norm.is_offset, norm.epsilon, *layers, site)
    return _Sublayer(kernels, dtype, made, num_outputs)
