"""Norms and rotary embedding as one call are those of many, in 16 bits too."""

from __future__ import annotations

import pytest
import torch

from ts_parallel.native import kernels_for
from ts_parallel.partition.program import RmsNorm
from ts_parallel.runtime.backends.base import Backend
from ts_parallel.runtime.backends.choose import choose_backend
from ts_parallel.runtime.backends.native.norms import is_turned_by_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def backend_of(dtype: torch.dtype) -> Backend:
    return choose_backend(torch.device("cpu"), dtype)


def plain_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, is_offset: bool) -> torch.Tensor:
    exact = hidden.float()
    scaled = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
    if is_offset:
        return (scaled * (1.0 + weight.float())).type_as(hidden)
    return weight * scaled.to(hidden.dtype)


@pytest.mark.parametrize("is_offset", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 5, 4, 20), (1, 40, 768), (1, 0, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_that_of_the_models_code(dtype: torch.dtype, shape: tuple[int, ...], is_offset: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
    norm = backend_of(dtype).make_norm(RmsNorm("weight", 1e-5, is_offset), weight)
    expected = plain_norm(hidden, weight, 1e-5, is_offset)
    assert norm(hidden).dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(norm(hidden), expected)
    else:  # a sum in another order may round to a neighbour, and its product with the weight
        torch.testing.assert_close(norm(hidden), expected, rtol=2 * torch.finfo(dtype).eps, atol=2**-24)
        assert expected.numel() == 0 or (norm(hidden) == expected).float().mean() > 0.99
    if len(shape) == 4:
        assert torch.equal(norm(hidden.transpose(1, 2)), norm(hidden).transpose(1, 2))


def test_norm_of_float32_by_a_bfloat16_weight_is_left_to_torch() -> None:
    hidden, weight = torch.randn(1, 5, 64), torch.randn(64).bfloat16()
    for is_offset in (False, True):
        norm = backend_of(torch.bfloat16).make_norm(RmsNorm("weight", 1e-5, is_offset), weight)
        assert torch.equal(norm(hidden), plain_norm(hidden, weight, 1e-5, is_offset))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 20, 64, 128])
def test_rotary_turns_the_halves_bit_for_bit(head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 19, 3, head_dim).to(dtype).transpose(1, 2)
    cosine, sine = (torch.randn(1, 1, 19, head_dim).to(dtype) for _ in range(2))
    first, second = hidden[..., : head_dim // 2], hidden[..., head_dim // 2 :]
    expected = hidden * cosine + torch.cat([-second, first], dim=-1) * sine
    assert torch.equal(backend_of(dtype).rotary(hidden, cosine, sine), expected)
    assert is_turned_by_kernels(hidden, cosine, sine) == (kernels_for(dtype) is not None)


@pytest.mark.parametrize(("items", "heads"), [(1, 3), (2, 1)])
def test_angles_that_differ_by_head_and_several_items_are_left_to_torch(items: int, heads: int) -> None:
    hidden, angles = torch.randn(items, 3, 5, 8).bfloat16(), torch.randn(1, heads, 5, 8).bfloat16()
    turned = torch.cat([-hidden[..., 4:], hidden[..., :4]], dim=-1)
    assert not is_turned_by_kernels(hidden, angles, angles)
    turn = backend_of(torch.bfloat16).rotary
    assert torch.equal(turn(hidden, angles, angles), hidden * angles + turned * angles)
