"""Weights that are kept as integers: what they hold, what linears make of them, and what ranks do together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from places import DEMO_MODEL, RANKS

from ts_parallel.native import HAS_KERNELS
from ts_parallel.native.packed_weight import INT4_GROUP, PackedWeight
from ts_parallel.partition.program import GatedLinear, LinearLayer, LinearLayers
from ts_parallel.runtime.backends.native.linears import make_embedding, make_linears

pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="no compiler, or this processor has no fast bfloat16")
both = pytest.mark.parametrize("quantization", ["int8", "int4"])
LARGEST = {"int8": 127, "int4": 7}
SCRIPT = RANKS / "quantized_logits.py"


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype) / 8


def pack(weight: torch.Tensor, quantization: str) -> PackedWeight:
    packed = PackedWeight.allocate((weight.shape[0], weight.shape[1]), quantization, weight.dtype)
    packed.put(0, weight)
    return packed


def scales(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """float32 `[O, I]`: the step of each number, by the rule that its group's largest is the largest integer."""
    size = weight.shape[1] if quantization == "int8" else INT4_GROUP
    groups = [part.float().abs().amax(1, keepdim=True).expand_as(part) for part in torch.split(weight, size, dim=1)]
    return (torch.cat(groups, dim=1) / LARGEST[quantization]).to(weight.dtype).float()


@both
@pytest.mark.parametrize("shape", [(1, 32), (64, 64), (100, 70), (65, 2), (256, 160)])
def test_quantized_weight_is_off_by_half_a_step_at_most(
    shape: tuple[int, int], quantization: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = normal(*shape, dtype=dtype)
    weight[shape[0] // 2] = 0
    step = scales(weight, quantization)
    integers = (weight.float() / step).nan_to_num(0).round()
    assert integers.abs().max() <= LARGEST[quantization]
    packed = pack(weight, quantization)
    # A scale is rounded, its inverse too: a number half-way between two integers may become either.
    difference = (packed.unpack().float() - weight.float()).abs()
    assert (difference <= 0.5 * step + packed.unpack().float().abs() * 2**-8 + 1e-6).all()
    assert torch.equal(packed.unpack()[shape[0] // 2], weight[shape[0] // 2])
    assert (packed.unpack() == (integers * step).to(dtype)).float().mean() > 0.99


@both
@pytest.mark.parametrize("exponent", [-24, -20, -16, -13, 0, 13])
def test_scale_is_never_lost_however_small_or_large_the_numbers(
    exponent: int, quantization: str, dtype: torch.dtype
) -> None:
    """In float16 a scale of small numbers has few bits, or would be zero. The largest number of all stays finite."""
    torch.manual_seed(0)
    weight = (torch.rand(64, 64) * 4 * torch.randn(64, 64).sign() * 2.0**exponent).to(dtype)
    weight[::5, 7] = torch.finfo(dtype).max
    packed, largest = pack(weight, quantization).unpack().double(), weight.double().abs().amax(1, keepdim=True)
    steps = largest / LARGEST[quantization] + (2.0**-24 if dtype == torch.float16 else 0)  # a scale may be the next one
    rounding = packed.abs() * torch.finfo(dtype).eps + 2.0**-25 * (dtype == torch.float16)
    assert bool(((packed - weight.double()).abs() <= steps / 2 + rounding).all())
    assert bool(packed.isfinite().all()) and bool((packed.abs().amax(1) > 0).all())


@both
def test_quantized_weight_takes_a_half_or_a_quarter_of_the_bytes(quantization: str) -> None:
    of_bfloat16 = PackedWeight.allocate((256, 1024), quantization).nbytes / (256 * 1024 * 2)
    assert of_bfloat16 == pytest.approx({"int8": 1 / 2, "int4": 1 / 4}[quantization], rel=0.07)


@both
def test_rows_are_quantized_a_few_panels_at_a_time_and_from_a_part_of_each(quantization: str) -> None:
    wide = normal(200, 300)
    packed = PackedWeight.allocate((200, 100), quantization)
    for first, last in ((128, 200), (0, 64), (64, 128)):
        packed.put(first, wide[first:last, 100:200])
    assert torch.equal(packed.unpack(), pack(wide[:, 100:200].contiguous(), quantization).unpack())


def integers_and_scales(
    shape: tuple[int, int], group: int, quantization: str, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a weight that a checkpoint has so: int8, scales, and its numbers in float64."""
    least, most = {"int8": (-128, 127), "int4": (-8, 7)}[quantization]
    integers = torch.randint(least, most + 1, shape, dtype=torch.int8)
    integers[0, :2] = torch.tensor([least, most])
    steps = (torch.rand(shape[0], -(-shape[1] // group)) - 0.3).to(scale_dtype) / 64  # some are negative
    return integers, steps, integers.double() * steps.double().repeat_interleave(group, dim=1)[:, : shape[1]]


@both
@pytest.mark.parametrize("shape", [(1, 2), (64, 64), (100, 70), (200, 320)])
@pytest.mark.parametrize("group", [8, 32, 128, 1000])
def test_integers_that_are_stored_stay_what_they_are(
    group: int, shape: tuple[int, int], quantization: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    integers, steps, numbers = integers_and_scales(shape, group, quantization, dtype)
    packed = PackedWeight.allocate(shape, quantization, dtype, group)
    for first in range(0, shape[0], 128):
        assert packed.put_integers(first, integers[first : first + 128], steps[first : first + 128])
    assert torch.equal(packed.unpack(), numbers.to(dtype))
    hidden = normal(1, 40, shape[1], dtype=dtype)
    exact = F.linear(hidden.double(), numbers)
    product = make_linears(LinearLayer("w", None), {"w": packed})(hidden)
    torch.testing.assert_close(product.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    for num_tokens in (1, 2, 7, 12):
        own = make_linears(LinearLayer("w", None), {"w": packed})(hidden[:, :num_tokens])
        assert torch.equal(own, product[:, :num_tokens])


@both
def test_integers_that_do_not_fit_are_not_laid_down(quantization: str) -> None:
    torch.manual_seed(0)
    shape = (130, 64)
    integers, steps, numbers = integers_and_scales(shape, 32, quantization, torch.float32)
    packed = PackedWeight.allocate(shape, quantization, torch.float16, 32)
    assert packed.put_integers(0, integers, steps)
    before = packed.unpack()
    torch.testing.assert_close(before.double(), numbers, rtol=2**-7, atol=0)  # scales rounded, integers as they were
    too_small, too_large, lost, nan = integers.clone(), integers.clone(), steps.clone(), steps.clone()
    too_small[129, 63], too_large[0, 5], lost[70, 1], nan[3, 0] = -9, 8, 1e-7, torch.nan
    assert not packed.put_integers(0, integers, lost)
    assert not packed.put_integers(0, integers, nan)
    for rows in (too_small, too_large) if quantization == "int4" else ():
        assert not packed.put_integers(0, rows, steps)
    assert torch.equal(packed.unpack(), before)


@both
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(100, 70), (768, 64), (33, 320), (1, 2)])
def test_quantized_linear_is_the_product_with_what_its_weight_means(
    shape: tuple[int, int], has_bias: bool, quantization: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    packed, bias = pack(normal(*shape, dtype=dtype), quantization), normal(shape[0], dtype=dtype) if has_bias else None
    linear = make_linears(LinearLayer("w", "b" if has_bias else None), {"w": packed, "b": bias})
    hidden, residual = (normal(1, 130, width, dtype=dtype) for width in reversed(shape))
    exact = F.linear(hidden.double(), packed.unpack().double(), None if bias is None else bias.double())
    product = linear(hidden)
    # Integers times scales are not rounded to 16 bits in a linear, as they are in what is unpacked.
    torch.testing.assert_close(product.double(), exact, rtol=torch.finfo(dtype).eps, atol=0.5 * torch.finfo(dtype).eps)
    assert torch.equal(linear(hidden, residual), product + residual)
    for num_tokens in (0, 1, 2, 7, 10, 11, 12, 40):
        assert torch.equal(linear(hidden[:, :num_tokens]), product[:, :num_tokens]), num_tokens


@both
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_quantized_linears_side_by_side_are_each_alone(num_tokens: int, quantization: str) -> None:
    torch.manual_seed(0)
    hidden = normal(1, num_tokens, 96)
    tensors = {name: pack(normal(size, 96), quantization) for name, size in (("q", 130), ("k", 64))}
    tensors["v"] = pack(normal(20, 96), "int8")
    layers = tuple(LinearLayer(name, None) for name in "qkv")
    together = make_linears(LinearLayers(layers), tensors)(hidden)
    for layer, output in zip(layers, together, strict=True):
        assert torch.equal(output, make_linears(layer, tensors)(hidden))


@both
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("num_tokens", [1, 9, 40])
def test_quantized_gated_linear_rounds_where_its_parts_do(
    num_tokens: int, activation: str, quantization: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    hidden = normal(1, num_tokens, 128, dtype=dtype) * 8
    packed = {name: pack(normal(150, 128, dtype=dtype), quantization) for name in ("gate", "up")}
    layers = {name: LinearLayer(name, None) for name in packed}
    gate, up = (make_linears(layer, packed)(hidden) for layer in layers.values())
    activate = {"silu": F.silu, "gelu_tanh": lambda value: F.gelu(value, approximate="tanh"), "relu": F.relu}
    at_once = make_linears(GatedLinear(layers["gate"], layers["up"], activation), packed)(hidden)
    in_parts = activate[activation](gate) * up
    torch.testing.assert_close(at_once, in_parts, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert (at_once == in_parts).float().mean() > {torch.bfloat16: 0.97, torch.float16: 0.9}[dtype]


@both
def test_embedding_finds_the_rows_of_a_quantized_weight(quantization: str, dtype: torch.dtype) -> None:
    packed, token_ids = pack(normal(200, 70, dtype=dtype), quantization), torch.tensor([[3, 199, 0], [64, 63, 3]])
    embedding = make_embedding(packed)
    assert torch.equal(embedding(token_ids.t()), F.embedding(token_ids.t(), packed.unpack()))
    assert embedding(token_ids[:, :0]).shape == (2, 0, 70)


@pytest.mark.ranks
def test_ranks_that_share_quantized_layers_compute_what_one_does(tmp_path: Path) -> None:
    """Nearly: a rank has scales of its own for its part of a row, and sums are rounded before they are added."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    logits = {}
    for num_ranks, launcher in ((1, []), (2, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])):
        result = subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), str(DEMO_MODEL)],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        logits[num_ranks] = {name: torch.tensor(own) for name, own in json.loads(result.stdout).items()}
    plain, scale = logits[1]["None"], logits[1]["None"].abs().max()
    for name, largest in (("None", 0.02), ("int8", 0.03), ("int4", 0.2)):
        assert (logits[1][name] - plain).abs().max() < largest * scale
        assert (logits[2][name] - logits[1][name]).abs().max() < largest * scale
    assert not torch.equal(logits[1]["int8"], plain)
