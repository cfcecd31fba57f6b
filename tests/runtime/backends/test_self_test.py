"""What computes rightly passes a backend's self-test, and what is off by a little more than it may is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ts_parallel.partition.program import Linears, RmsNorm
from ts_parallel.runtime.backends.base import Backend, Tensors
from ts_parallel.runtime.backends.choose import choose_backend
from ts_parallel.runtime.backends.self_test import operations
from ts_parallel.runtime.backends.torch.backend import TorchBackend
from ts_parallel.step_plan import Chunk

CPU = torch.device("cpu")
NAMES = ["linear bfloat16", "attention", "norm", "rotary", "argmax"]
BACKENDS: list[Callable[[torch.dtype], Backend]] = [
    lambda dtype: TorchBackend(),
    lambda dtype: choose_backend(CPU, dtype),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", BACKENDS, ids=["torch", "chosen"])
def test_every_operation_is_right_and_says_how_far_off_it_is(
    make: Callable[[torch.dtype], Backend], dtype: torch.dtype
) -> None:
    backend = make(dtype)
    own = operations(backend, dtype)
    integers = [f"linear {kind}" for kind in ("int8", "int4") if kind in backend.quantizations]
    assert list(own) == [NAMES[0].replace("bfloat16", str(dtype).removeprefix("torch.")), *integers, *NAMES[1:]]
    for name, operation in own.items():
        found = operation()
        assert found.num_wrong == 0, name
        assert found.num_numbers >= 7
        assert 0 <= found.share <= 1
        assert (found.share == 0) == (name == "argmax")  # what is rounded is never float64's
        assert operation() == found


class Wrong(TorchBackend):
    """Whose results `spoil` has gone over."""

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._spoil = spoil

    def make_linears(self, entry: Linears, tensors: Tensors) -> Callable[..., Any]:
        linear = super().make_linears(entry, tensors)
        return lambda hidden: self._spoil(linear(hidden))

    def make_norm(self, entry: RmsNorm, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        norm = super().make_norm(entry, weight)
        return lambda hidden: self._spoil(norm(hidden))

    def rotary(self, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        return self._spoil(super().rotary(hidden, cosine, sine))

    def make_attention(self, *arguments: Any) -> Any:
        attention = super().make_attention(*arguments)

        class Spoilt:
            lay_out = staticmethod(attention.lay_out)

            def __call__(_, *rest: Any) -> torch.Tensor:
                return self._spoil(attention(*rest))

        return Spoilt()

    def choose(self, logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
        tokens = super().choose(logits, chunks)
        return [tokens[0] + 1, *tokens[1:]]


def zero_one(numbers: torch.Tensor) -> torch.Tensor:
    """Its largest number alone."""
    spoilt = numbers.clone().flatten()
    spoilt[spoilt.abs().argmax()] = 0
    return spoilt.view(numbers.shape)


def nan_one(numbers: torch.Tensor) -> torch.Tensor:
    spoilt = numbers.clone().flatten()
    spoilt[-1] = math.nan
    return spoilt.view(numbers.shape)


@pytest.mark.parametrize("spoil", [zero_one, nan_one, lambda numbers: numbers * 1.1])
@pytest.mark.parametrize("name", NAMES)
def test_wrong_number_is_counted(name: str, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found = operations(Wrong(spoil))[name]()
    assert found.num_wrong >= 1
    assert found.share > 1


def test_what_is_near_enough_in_bfloat16_is_not_so_in_float16() -> None:
    def spoil(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.bfloat16().to(numbers.dtype)

    for dtype, is_right in ((torch.bfloat16, True), (torch.float16, False)):
        found = operations(Wrong(spoil), dtype)["norm"]()
        assert (found.num_wrong == 0) == is_right


def test_second_of_two_greatest_logits_is_wrong() -> None:
    class Last(TorchBackend):
        def choose(self, logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
            return [logits.shape[1] - 1 - int(row.flip(0).argmax()) for row in logits]

    found = operations(Last())["argmax"]()
    assert (found.num_numbers, found.num_wrong) == (7, 7)
