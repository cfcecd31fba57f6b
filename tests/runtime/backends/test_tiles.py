"""The kernels' tiles and those of the libraries beside them do not disturb each other, in one thread, in several, and
in a process that was forked from one that has used them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from ts_parallel.native import VARIANT
from ts_parallel.native.packed_weight import PackedWeight
from ts_parallel.partition.program import LinearLayer
from ts_parallel.runtime.backends.native.linears import make_linears

pytestmark = pytest.mark.skipif(VARIANT is None or VARIANT.name != "amx", reason="this processor has no tiles")
ROUNDS = 20


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16) / 8


@pytest.fixture
def work() -> list[Callable[[], torch.Tensor]]:
    """Ours at several numbers of rows, and torch's functions that use tiles: products, attention, a convolution."""
    torch.manual_seed(0)
    weight = normal(192, 256)
    packed = PackedWeight.allocate((192, 256))
    packed.put(0, weight)
    linear = make_linears(LinearLayer("w", None), {"w": packed})
    hidden, heads, picture = normal(300, 256), normal(2, 8, 160, 64), normal(4, 32, 24, 24)
    filters = normal(32, 32, 3, 3)
    return [
        lambda: linear(hidden[:3]),
        lambda: F.linear(hidden, weight),
        lambda: linear(hidden),
        lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
        lambda: linear(hidden[:17]),
        lambda: F.conv2d(picture, filters),
    ]


def bits(numbers: torch.Tensor) -> bytes:
    return numbers.view(torch.int16).numpy().tobytes()  # without torch's threads, which no fork has


def assert_repeats(work: list[Callable[[], torch.Tensor]], expected: list[torch.Tensor]) -> None:
    for _ in range(ROUNDS):
        for own, wanted in zip(work, expected, strict=True):
            assert bits(own()) == bits(wanted)


def test_libraries_that_use_tiles_in_turns_have_the_same_bits_as_alone(
    work: list[Callable[[], torch.Tensor]],
) -> None:
    expected = [[own() for _ in range(3)][-1] for own in work]
    assert_repeats(work, expected)
    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(assert_repeats, work, expected) for _ in range(3)]:
            done.result()


def test_forked_process_has_tiles_of_its_own(work: list[Callable[[], torch.Tensor]]) -> None:
    ours = work[::2][:2] + work[4:5]
    expected = [own() for own in ours]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert_repeats(ours, expected)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert_repeats(ours, expected)
