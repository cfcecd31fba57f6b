"""A stage's generated function does what its graph says, forgets what it has used, and skips what changes nothing."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from ts_parallel.partition.graph.stage_code import write_stage
from ts_parallel.partition.graph.stages import Places, cut
from ts_parallel.partition.graph.trace import InputSpec, trace
from ts_parallel.partition.program import StageCode
from ts_parallel.runtime.backends.torch.backend import TorchBackend
from ts_parallel.runtime.stage import Stage
from ts_parallel.topology import TensorParallelGroup

ALONE = TensorParallelGroup(0, 1)
SPEC = {"x": InputSpec((1, "T", 4), torch.float32)}


class Model(nn.Module):
    """One layer whose forward is a given function of a weight and the input."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4, device="meta"), requires_grad=False)
        self._function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._function(self.weight, x)


Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def code_of(function: Function) -> StageCode:
    model = Model(function)

    def call(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        output: torch.Tensor = model(inputs["x"])
        return output

    traced = trace(model, SPEC, call, {"T": 64})  # type: ignore[arg-type]
    (graph,) = cut(Places(traced, "", 1), (), ())
    return write_stage(graph)


def stage_of(function: Function, weight: torch.Tensor) -> Stage:
    return Stage(code_of(function), {"weight": weight}, ALONE, TorchBackend())


FUNCTIONS: dict[str, Function] = {
    "add with alpha": lambda w, x: torch.add(x @ w, x, alpha=0.5),
    "subtract from a number": lambda w, x: 1.0 - x @ w,
    "subtract with alpha": lambda w, x: torch.sub(x @ w, x, alpha=2),
    "divide a number": lambda w, x: 1.0 / (1.0 + (x @ w) ** 2),
    "integer division": lambda w, x: torch.div(x @ w, 0.3, rounding_mode="floor"),
    "slices": lambda w, x: torch.cat([(x @ w)[..., 2:], -(x @ w)[..., :2], (x @ w)[..., 1:-1]], -1),
    "a dim of the size of the input": lambda w, x: (x @ w).view(x.shape[1], 2, 2).transpose(1, 2).reshape(1, -1, 4),
    "mean and variance": lambda w, x: (x @ w).pow(2).mean(-1, keepdim=True, dtype=torch.float64).rsqrt().float() * x,
    "chunks": lambda w, x: torch.chunk(x @ w, 2, dim=-1)[1].repeat(1, 1, 2),
    "gelu": lambda w, x: torch.nn.functional.gelu(x @ w, approximate="tanh"),
    "softmax": lambda w, x: torch.softmax(x @ w, dim=-1, dtype=torch.float32),
    "infinity": lambda w, x: (x @ w).masked_fill(x > 0, float("-inf")),
    "in place": lambda w, x: (x @ w).clone().add_(1.0).mul_(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_function_computes_what_the_model_does_bit_for_bit(name: str, num_tokens: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, 4), torch.randn(1, num_tokens, 4)
    (output,) = stage_of(FUNCTIONS[name], weight)(None, {"x": x})
    assert torch.equal(output, FUNCTIONS[name](weight, x))


def test_each_tensor_is_forgotten_after_its_last_use() -> None:
    code = code_of(lambda w, x: ((x @ w).relu() + 1.0).tanh())
    *body, last = [line.strip() for line in code.source.splitlines()[1:]]
    made = [line.split(" = ")[0] for line in body if " = " in line]
    forgotten = [line.removeprefix("del ") for line in body if line.startswith("del ")]
    assert sorted(forgotten) == sorted(made[:-1])
    assert last == f"return [{made[-1]}]"


def test_what_changes_nothing_is_left_out() -> None:
    code = code_of(lambda w, x: torch.dropout((x @ w).to(torch.float32) * 1.0, 0.5, False))
    assert [name for name in ("dropout(", "_to(", "_mul(") if name in code.source] == []


def test_cast_to_another_type_is_kept() -> None:
    weight, x = torch.randn(4, 4), torch.randn(1, 3, 4)
    (output,) = stage_of(lambda w, x: (x @ w).to(torch.bfloat16), weight)(None, {"x": x})
    assert output.dtype == torch.bfloat16


def test_what_the_code_makes_itself_lies_where_the_weights_are() -> None:
    """The trace is made on the CPU, and says so in each call that makes a tensor."""
    kept = torch.arange(4.0)
    function = lambda w, x: (x @ w + torch.arange(4, device=x.device) * kept).to(x.device)  # noqa: E731
    stage = stage_of(function, torch.empty(4, 4, device="meta"))
    (output,) = stage(None, {"x": torch.empty(1, 5, 4, device="meta")})
    assert output.is_meta and output.shape == (1, 5, 4)


def test_no_name_stands_for_two_things() -> None:
    """Operations whose names begin as those of the function's globals do."""
    function = lambda w, x: torch.ops.aten._softmax(torch.softmax(x @ w, -1), -1, False) @ w  # noqa: E731
    weight, x = torch.randn(4, 4), torch.randn(1, 3, 4)
    stage = stage_of(function, weight)
    (output,) = stage(None, {"x": x})
    assert torch.equal(output, function(weight, x))


def test_traceback_shows_the_line_of_a_stages_own_code() -> None:
    function = FUNCTIONS["subtract from a number"]
    with pytest.raises(RuntimeError) as failure:
        stage_of(function, torch.eye(4))(None, {"x": torch.zeros(1, 2, 5)})
    (frame,) = [own for own in traceback.extract_tb(failure.tb) if own.filename.startswith("<stage ")]
    assert frame.line and frame.line in [line.strip() for line in code_of(function).source.splitlines()]
