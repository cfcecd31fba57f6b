"""Norms and rotary embedding as one pass each, in 16 bits, with every rounding in its place (only the sum of a norm's
squares is taken in another order)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ts_parallel.native import kernels_for
from ts_parallel.partition.program import RmsNorm
from ts_parallel.runtime.backends.torch import norms as plain


def make_norm(entry: RmsNorm, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """hidden `[..., K]` → the same shape and type, over `weight` `[K]`."""
    plain_norm = plain.make_norm(entry, weight)
    kernels, dtype = kernels_for(weight.dtype), weight.dtype
    if kernels is None or not is_for_kernels(weight):
        return plain_norm
    epsilon, is_offset = entry.epsilon, entry.is_offset
    width, place, run = len(weight), weight.data_ptr(), kernels.rms_norm

    def norm(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dtype != dtype:  # some families keep their residual stream in float32
            return plain_norm(hidden)
        hidden = hidden.contiguous()
        output = torch.empty_like(hidden)
        rows = hidden.numel() // width
        run(hidden.data_ptr(), place, output.data_ptr(), rows, width, is_offset, epsilon)
        return output

    return norm


def rotary(hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x cos + (-x2, x1) sin for the halves x1 and x2 of x, which is `hidden` `[1, H, T, D]`; the others broadcast."""
    kernels = kernels_for(hidden.dtype)
    if kernels is None or not is_turned_by_kernels(hidden, cosine, sine):
        return plain.rotary(hidden, cosine, sine)
    _, num_heads, num_tokens, head_dim = hidden.shape
    output = hidden.new_empty((1, num_tokens, num_heads, head_dim))
    _, head_stride, token_stride, _ = hidden.stride()
    kernels.rotary(
        hidden.data_ptr(),
        token_stride,
        head_stride,
        num_tokens,
        num_heads,
        head_dim,
        cosine.data_ptr(),
        sine.data_ptr(),
        output.data_ptr(),
    )
    return output.transpose(1, 2)


def is_for_kernels(tensor: torch.Tensor) -> bool:
    return kernels_for(tensor.dtype) is not None and tensor.device.type == "cpu" and tensor.is_contiguous()


def is_turned_by_kernels(hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> bool:
    """Whether `rotary` of these is a kernel's work."""
    return (
        kernels_for(hidden.dtype) is not None
        and hidden.device.type == "cpu"
        and hidden.stride(-1) == 1
        and hidden.ndim == 4
        and hidden.shape[0] == 1
        and are_angles_for_kernels(cosine, sine, hidden.shape[-2], hidden.shape[-1], hidden.dtype)
    )


def are_angles_for_kernels(
    cosine: torch.Tensor, sine: torch.Tensor, num_tokens: int, head_dim: int, dtype: torch.dtype
) -> bool:
    """Whether the kernels for `dtype` turn `num_tokens` heads by these."""
    return (
        cosine.dtype == sine.dtype == dtype
        and cosine.shape == sine.shape == (1, 1, num_tokens, head_dim)
        and cosine.is_contiguous()
        and sine.is_contiguous()
    )
