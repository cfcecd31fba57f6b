"""Weights in bfloat16 take 12 bits a number, give back every bit, and multiply as they did before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from ts_parallel.native import HAS_KERNELS
from ts_parallel.native.packed_weight import PANEL, PackedWeight
from ts_parallel.partition.program import GatedLinear, LinearLayer
from ts_parallel.runtime.backends.native.linears import make_linears

pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="no compiler, or this processor has no fast bfloat16")
SHAPE = (200, 330)  # three panels and a part of one; the last columns fill no vector


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16) / 8


def any_bits() -> torch.Tensor:
    """Every number there is, infinity, and both zeros: more upper bytes than codes, in every panel."""
    bits = torch.arange(SHAPE[0] * SHAPE[1]).to(torch.int16)[torch.randperm(SHAPE[0] * SHAPE[1])].view(SHAPE)
    return bits.view(torch.bfloat16).nan_to_num(0, float("inf"), -float("inf"))


def any_lower_bytes() -> torch.Tensor:
    """Every number that has a code, with either sign, and a few exceptions."""
    bits = torch.arange(7 * 2**8) + (0x3F << 8) + torch.tensor([[0], [2**15]])
    weight = bits.flatten().to(torch.int16)[torch.randint(bits.numel(), SHAPE)].view(torch.bfloat16)
    weight[:, 50] = (torch.arange(SHAPE[0]) * 70).to(torch.int16).view(torch.bfloat16)
    return weight


def with_zeros() -> torch.Tensor:
    """Half of the numbers, some of them negative zero, and a row without others."""
    weight = normal(*SHAPE) * (torch.rand(SHAPE) < 0.5)
    weight[70] = 0
    weight[:, 100] = -0.0
    return weight


def with_tiny_numbers() -> torch.Tensor:
    """Some that are exceptions, several of a pair and in the last one, and numbers that are not normal."""
    weight = normal(*SHAPE)
    weight[::7, 5] = 2.0**-60
    weight[64:128, 200] *= 2.0**-30
    weight[150, 200:202] *= 2.0**-30
    weight[130, ::40] = 2.0**-130
    weight[199, 329] = -(2.0**-20)
    return weight


def with_an_outlier() -> torch.Tensor:
    """In one panel, beside which all others are exceptions."""
    weight = normal(*SHAPE)
    weight[100, 100] = 1e30
    return weight


WEIGHTS = {
    "normal": lambda: normal(*SHAPE),
    "zeros": with_zeros,
    "tiny": with_tiny_numbers,
    "outlier": with_an_outlier,
    "any bits": any_bits,
    "any lower bytes": any_lower_bytes,
    "nothing": lambda: torch.zeros(SHAPE, dtype=torch.bfloat16),
    "subnormal": lambda: torch.full(SHAPE, 2.0**-130, dtype=torch.bfloat16),
    "infinite": lambda: torch.full(SHAPE, float("inf"), dtype=torch.bfloat16),
}
NUM_PLAIN = {"outlier": 1, "any bits": 4}
weights = pytest.mark.parametrize(("kind", "make"), WEIGHTS.items(), ids=WEIGHTS)


def pack(weight: torch.Tensor) -> PackedWeight:
    packed = PackedWeight.allocate((weight.shape[0], weight.shape[1]))
    assert not packed.put(0, weight)
    return packed


@weights
def test_every_bit_comes_back(kind: str, make: Callable[[], torch.Tensor]) -> None:
    torch.manual_seed(0)
    weight = make()
    packed = pack(weight)
    assert torch.equal(packed.unpack().view(torch.int16), weight.view(torch.int16))
    assert len(packed.plain) == NUM_PLAIN.get(kind, 0)


@weights
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 6, 10, 11, 12, 45])
def test_products_are_those_of_the_numbers(num_tokens: int, kind: str, make: Callable[[], torch.Tensor]) -> None:
    torch.manual_seed(0)
    weight = make().clamp(-1e30, 1e30)
    hidden = normal(1, num_tokens, SHAPE[1])
    linear = make_linears(LinearLayer("w", None), {"w": pack(weight)})
    product = linear(hidden)
    expected = F.linear(hidden.double(), weight.double())
    scale = F.linear(hidden.double().abs(), weight.double().abs())  # of what is added up
    assert ((product.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5 * scale + 1e-38).all()
    for token in range(num_tokens):
        assert torch.equal(linear(hidden[:, token : token + 1])[:, 0], product[:, token])


def test_weight_that_is_put_again_is_the_new_one() -> None:
    torch.manual_seed(0)
    packed = PackedWeight.allocate(SHAPE)
    assert torch.equal(packed.unpack(), torch.zeros(SHAPE, dtype=torch.bfloat16))
    for weight in (with_tiny_numbers(), any_bits(), normal(*SHAPE), with_an_outlier()):
        packed.put(0, weight)
        assert torch.equal(packed.unpack().view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("num_tokens", [1, 8, 40])
@pytest.mark.parametrize("plain", ["gate", "up"])
def test_gated_pair_of_which_one_has_panels_without_codes(plain: str, num_tokens: int) -> None:
    torch.manual_seed(0)
    hidden, tensors = normal(1, num_tokens, SHAPE[1]), {"gate": normal(*SHAPE), "up": normal(*SHAPE)}
    tensors[plain][100, 100] = 1e30
    entry = GatedLinear(LinearLayer("gate", None), LinearLayer("up", None), "silu")
    at_once = make_linears(entry, {name: pack(weight) for name, weight in tensors.items()})(hidden)
    others = [row for row in range(SHAPE[0]) if row != 100]
    torch.testing.assert_close(
        at_once[..., others], make_linears(entry, tensors)(hidden)[..., others], rtol=2**-6, atol=1e-3
    )


def test_exceptions_up_to_the_room_for_them() -> None:
    room = 89  # of a panel of 330 inputs: a number in 256, and what is left of a cache line
    for number, num_plain in ((room, 0), (room + 1, 1)):
        weight = torch.ones((PANEL, SHAPE[1]), dtype=torch.bfloat16)
        weight.view(-1)[torch.randperm(weight.numel())[:number]] = 2.0**-40
        packed = pack(weight)
        assert len(packed.plain) == num_plain
        assert torch.equal(packed.unpack(), weight)


def test_bytes_of_a_weight() -> None:
    packed = pack(normal(1024, 1024))
    assert packed.nbytes / (1024 * 1024 * 2) == pytest.approx(0.75, rel=0.02)
    with_plain = normal(1024, 1024)
    with_plain[0, 0] = 1e30
    assert pack(with_plain).nbytes == packed.nbytes + PANEL * 1024 * 2
