"""Linears over packed weights multiply as torch does, up to the rounding of 16 bits, alone and in groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, save_random_model
from whole_model import build_rank_model

from ts_parallel.native import HAS_KERNELS, kernels_for
from ts_parallel.native.packed_weight import PackedWeight, can_pack
from ts_parallel.partition.program import GatedLinear, LinearLayer, LinearLayers
from ts_parallel.runtime.backends.native.linears import layer_of, make_embedding, make_linears
from ts_parallel.topology import TensorParallelGroup

needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no compiler, or this processor has no fast bfloat16")
# One rounding of the result, and what float32 sums in another order differ by.
ROUNDING = {torch.bfloat16: {"rtol": 2**-8, "atol": 1e-4}, torch.float16: {"rtol": 2**-11, "atol": 1e-5}}


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype) / 8


def pack(weight: torch.Tensor) -> PackedWeight:
    packed = PackedWeight.allocate((weight.shape[0], weight.shape[1]), dtype=weight.dtype)
    packed.put(0, weight)
    return packed


def exact(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 32), (64, 64), (100, 70), (65, 2), (256, 96)])
def test_packed_weight_holds_every_number_in_its_place(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = normal(*shape, dtype=dtype)
    packed = pack(weight)
    assert torch.equal(packed.unpack(), weight)


@needs_kernels
def test_rows_are_packed_a_few_panels_at_a_time_and_from_a_part_of_each(dtype: torch.dtype) -> None:
    wide = normal(200, 300, dtype=dtype)
    packed = PackedWeight.allocate((200, 100), dtype=dtype)
    for first, last in ((128, 200), (0, 64), (64, 128)):
        packed.put(first, wide[first:last, 100:200])
    assert torch.equal(packed.unpack(), wide[:, 100:200])


@needs_kernels
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("place", [(0, 0), (63, 33), (64, 69), (99, 31), (99, 69)])
def test_who_packs_rows_hears_of_nan_and_not_of_infinity(
    place: tuple[int, int], quantization: str | None, dtype: torch.dtype
) -> None:
    rows = normal(100, 70, dtype=dtype)
    packed = PackedWeight.allocate((100, 70), quantization, dtype)
    for number, is_nan in ((0.0, False), (float("inf"), False), (-float("inf"), False), (float("nan"), True)):
        rows[place] = number
        assert packed.put(0, rows) is is_nan
    rows[place] = 1.0
    assert not packed.put(0, rows)


@needs_kernels
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 5, 6, 7, 8, 13, 130, 300])
@pytest.mark.parametrize("shape", [(100, 70), (768, 64), (1, 2), (70, 1024)])
def test_packed_linear_is_the_plain_one(
    shape: tuple[int, int], num_tokens: int, has_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = normal(*shape, dtype=dtype), normal(shape[0], dtype=dtype) if has_bias else None
    hidden, residual = (normal(1, num_tokens, width, dtype=dtype) for width in reversed(shape))
    tensors = {"w": pack(weight), "b": bias}
    linear = make_linears(LinearLayer("w", "b" if has_bias else None), tensors)
    product = linear(hidden)
    assert product.shape == (1, num_tokens, shape[0])
    torch.testing.assert_close(product.double(), exact(hidden, weight, bias), **ROUNDING[dtype])
    assert torch.equal(linear(hidden, residual), product + residual)
    strided = hidden.expand(2, -1, -1).transpose(0, 1)
    assert torch.equal(linear(strided)[:, 1], product[0])


@needs_kernels
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_linears_side_by_side_are_each_alone(num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = normal(1, num_tokens, 96, dtype=dtype)
    tensors: dict[str, Any] = {
        name: pack(normal(size, 96, dtype=dtype)) for name, size in (("q", 130), ("k", 64), ("v", 20))
    }
    tensors["b"] = normal(64, dtype=dtype)
    layers = tuple(LinearLayer(name, "b" if name == "k" else None) for name in "qkv")
    together = make_linears(LinearLayers(layers), tensors)(hidden)
    assert len(together) == 3
    for layer, output in zip(layers, together, strict=True):
        assert torch.equal(output, make_linears(layer, tensors)(hidden))


@needs_kernels
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_gated_linear_rounds_where_its_parts_do(num_tokens: int, activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, gate, up = (normal(*shape, dtype=dtype) for shape in ((1, num_tokens, 64), (150, 64), (150, 64)))
    hidden *= 8
    entry = GatedLinear(LinearLayer("gate", None), LinearLayer("up", None), activation)
    at_once = make_linears(entry, {"gate": pack(gate), "up": pack(up)})(hidden)
    in_parts = make_linears(entry, {"gate": gate, "up": up})(hidden)
    torch.testing.assert_close(at_once, in_parts, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert (at_once == in_parts).float().mean() > {torch.bfloat16: 0.97, torch.float16: 0.9}[dtype]
    half_packed = make_linears(entry, {"gate": pack(gate), "up": up})(hidden)
    torch.testing.assert_close(half_packed, in_parts, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_float32_stays_plain_and_keeps_its_bits() -> None:
    weight, other, hidden, residual = (
        torch.randn(64, 32),
        torch.randn(8, 32),
        torch.randn(1, 3, 32),
        torch.randn(1, 3, 64),
    )
    assert not can_pack(weight) and not can_pack(torch.zeros(8, 3, dtype=torch.bfloat16))
    tensors = {"w": weight, "o": other}
    layers = (LinearLayer("w", None), LinearLayer("o", None))
    product = F.linear(hidden, weight)
    assert torch.equal(make_linears(layers[0], tensors)(hidden, residual), product + residual)
    first, second = make_linears(LinearLayers(layers), tensors)(hidden)
    assert torch.equal(first, product) and torch.equal(second, F.linear(hidden, other))


@needs_kernels
def test_embedding_finds_the_rows_of_a_packed_weight(dtype: torch.dtype) -> None:
    weight, token_ids = normal(200, 70, dtype=dtype), torch.tensor([[3, 199, 0], [64, 63, 3]])
    expected = F.embedding(token_ids, weight)
    for stored in (weight, pack(weight)):
        embedding = make_embedding(stored)
        assert torch.equal(embedding(token_ids), expected)
        assert torch.equal(embedding(token_ids.t()), expected.transpose(0, 1))
        assert embedding(token_ids[:, :0]).shape == (2, 0, 70)


@needs_kernels
def test_weights_of_two_dtypes_are_not_one_call() -> None:
    """Each has the numbers that it has alone."""
    weights = {"b": torch.bfloat16, "h": torch.float16}
    tensors = {name: pack(normal(64, 32, dtype=dtype)) for name, dtype in weights.items() if kernels_for(dtype)}
    layers = tuple(LinearLayer(name, None) for name in tensors)
    together = make_linears(LinearLayers(layers), tensors)
    assert [layer_of(together, dtype) is None for dtype in weights.values()] == [len(tensors) == 2, True]


@needs_kernels
def test_float16_is_rounded_as_torch_rounds_it_from_the_least_to_infinity() -> None:
    """Products with 1: subnormal numbers, ties, what overflows, and both signs."""
    if kernels_for(torch.float16) is None:
        pytest.skip("no kernels for float16")
    magnitudes = torch.tensor([2.0**-24, 3 * 2.0**-24, 2.0**-14, 1.0, 1 + 2.0**-10, 1 + 3 * 2.0**-10, 40000.0, 65504.0])
    weight = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, float("inf")])]).half()[:, None].repeat(1, 2)
    factors = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.25, 0.25], [1.0, 2.0**-11], [1.0, 1.0], [1.5, 0.75]]).half()
    product = make_linears(LinearLayer("w", None), {"w": pack(weight)})(factors[None])[0]
    expected = (factors.double() @ weight.double().T).half()
    is_number = ~expected.isnan()
    assert torch.equal(product[is_number], expected[is_number]) and bool(product[~is_number].isnan().all())
    assert bool(expected.isinf().any()) and bool((expected.abs() == 2.0**-24).any())


@needs_kernels
@pytest.mark.parametrize("is_tied", [False, True])
def test_weight_that_linears_read_is_packed_also_if_the_embedding_shares_it(is_tied: bool, tmp_path: Path) -> None:
    save_random_model(tmp_path, FAMILIES["llama"](tie_word_embeddings=is_tied), dtype=torch.bfloat16)
    alone, cpu = TensorParallelGroup(0, 1), torch.device("cpu")
    plain = build_rank_model(tmp_path, "auto", alone, cpu).tensors
    packed = build_rank_model(tmp_path, "auto", alone, cpu, packs=True).tensors
    linears = {name for name, tensor in plain.items() if tensor.ndim == 2}
    kept = set() if is_tied else {"model.embed_tokens.weight"}
    assert {name for name, tensor in packed.items() if isinstance(tensor, PackedWeight)} == linears - kept
    for name, tensor in packed.items():
        assert torch.equal(tensor.unpack() if isinstance(tensor, PackedWeight) else tensor, plain[name]), name
