"""Norms and rotary embedding by the very operations of the model's own code, one by one: float32 keeps its bits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ts_parallel.partition.program import RmsNorm


def make_norm(entry: RmsNorm, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """hidden `[..., K]` → the same shape and type, over `weight` `[K]`."""
    epsilon, is_offset = entry.epsilon, entry.is_offset

    def norm(hidden: torch.Tensor) -> torch.Tensor:
        exact = hidden.to(torch.float32)
        scaled = exact * torch.rsqrt(exact.pow(2).mean([-1], True) + epsilon)
        if is_offset:
            return (scaled * (1.0 + weight.to(torch.float32))).to(hidden.dtype)
        return weight * scaled.to(hidden.dtype)

    return norm


def rotary(hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x cos + (-x2, x1) sin for the halves x1 and x2 of x, which is `hidden` `[1, H, T, D]`; the others broadcast."""
    half = hidden.shape[-1] // 2
    first, second = torch.split(hidden, [half, hidden.shape[-1] - half], -1)
    turned = torch.cat([-second, first], -1)
    return hidden * cosine + turned * sine
