"""Linears over packed weights multiply as torch does, up to the rounding of bfloat16, alone and in groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, save_random_model
from whole_model import build_rank_model

from ts_parallel.native import HAS_KERNELS
from ts_parallel.native.packed_weight import PackedWeight, can_pack
from ts_parallel.partition.program import GatedLinear, LinearLayer, LinearLayers
from ts_parallel.runtime.backends.native.linears import make_embedding, make_linears
from ts_parallel.topology import TensorParallelGroup

needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no compiler, or this processor has no fast bfloat16")
# One rounding of the result, and what float32 sums in another order differ by.
ROUNDING = {"rtol": 2**-8, "atol": 1e-4}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16) / 8


def pack(weight: torch.Tensor) -> PackedWeight:
    packed = PackedWeight.allocate((weight.shape[0], weight.shape[1]))
    packed.put(0, weight)
    return packed


def exact(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 32), (64, 64), (100, 70), (65, 2), (256, 96)])
def test_packed_weight_holds_every_number_in_its_place(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    packed = pack(weight)
    assert torch.equal(packed.unpack(), weight)


@needs_kernels
def test_rows_are_packed_a_few_panels_at_a_time_and_from_a_part_of_each() -> None:
    wide = normal(200, 300)
    packed = PackedWeight.allocate((200, 100))
    for first, last in ((128, 200), (0, 64), (64, 128)):
        packed.put(first, wide[first:last, 100:200])
    assert torch.equal(packed.unpack(), wide[:, 100:200])


@needs_kernels
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("place", [(0, 0), (63, 33), (64, 69), (99, 31), (99, 69)])
def test_who_packs_rows_hears_of_nan_and_not_of_infinity(place: tuple[int, int], quantization: str | None) -> None:
    rows = normal(100, 70)
    packed = PackedWeight.allocate((100, 70), quantization)
    for number, is_nan in ((0.0, False), (float("inf"), False), (-float("inf"), False), (float("nan"), True)):
        rows[place] = number
        assert packed.put(0, rows) is is_nan
    rows[place] = 1.0
    assert not packed.put(0, rows)


@needs_kernels
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 5, 6, 7, 8, 13, 130, 300])
@pytest.mark.parametrize("shape", [(100, 70), (768, 64), (1, 2)])
def test_packed_linear_is_the_plain_one(shape: tuple[int, int], num_tokens: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias = normal(*shape), normal(shape[0]) if has_bias else None
    hidden, residual = normal(1, num_tokens, shape[1]), normal(1, num_tokens, shape[0])
    tensors = {"w": pack(weight), "b": bias}
    linear = make_linears(LinearLayer("w", "b" if has_bias else None), tensors)
    product = linear(hidden)
    assert product.shape == (1, num_tokens, shape[0])
    torch.testing.assert_close(product.double(), exact(hidden, weight, bias), **ROUNDING)
    assert torch.equal(linear(hidden, residual), product + residual)
    strided = hidden.expand(2, -1, -1).transpose(0, 1)
    assert torch.equal(linear(strided)[:, 1], product[0])


@needs_kernels
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_linears_side_by_side_are_each_alone(num_tokens: int) -> None:
    torch.manual_seed(0)
    hidden = normal(1, num_tokens, 96)
    tensors = {name: pack(normal(size, 96)) for name, size in (("q", 130), ("k", 64), ("v", 20))}
    tensors["b"] = normal(64)
    layers = tuple(LinearLayer(name, "b" if name == "k" else None) for name in "qkv")
    together = make_linears(LinearLayers(layers), tensors)(hidden)
    assert len(together) == 3
    for layer, output in zip(layers, together, strict=True):
        assert torch.equal(output, make_linears(layer, tensors)(hidden))


@needs_kernels
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_gated_linear_rounds_where_its_parts_do(num_tokens: int, activation: str) -> None:
    torch.manual_seed(0)
    hidden, gate, up = normal(1, num_tokens, 64) * 8, normal(150, 64), normal(150, 64)
    entry = GatedLinear(LinearLayer("gate", None), LinearLayer("up", None), activation)
    at_once = make_linears(entry, {"gate": pack(gate), "up": pack(up)})(hidden)
    in_parts = make_linears(entry, {"gate": gate, "up": up})(hidden)
    torch.testing.assert_close(at_once, in_parts, rtol=2**-6, atol=1e-3)
    assert (at_once == in_parts).float().mean() > 0.97
    half_packed = make_linears(entry, {"gate": pack(gate), "up": up})(hidden)
    torch.testing.assert_close(half_packed, in_parts, rtol=2**-6, atol=1e-3)


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
def test_embedding_finds_the_rows_of_a_packed_weight() -> None:
    weight, token_ids = normal(200, 70), torch.tensor([[3, 199, 0], [64, 63, 3]])
    expected = F.embedding(token_ids, weight)
    for stored in (weight, pack(weight)):
        embedding = make_embedding(stored)
        assert torch.equal(embedding(token_ids), expected)
        assert torch.equal(embedding(token_ids.t()), expected.transpose(0, 1))
        assert embedding(token_ids[:, :0]).shape == (2, 0, 70)


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
