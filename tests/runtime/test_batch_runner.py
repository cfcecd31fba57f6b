"""Every schedule gives the uncut model's outputs, over real ranks; an error leaves no rank believed to be in step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import RANKS

from ts_parallel.errors import EngineError
from ts_parallel.partition.program import Crossing
from ts_parallel.runtime.batch.batch_runner import BatchRunner, decode_specs, encode_specs

SCRIPT = RANKS / "batch.py"


@pytest.mark.ranks
@pytest.mark.parametrize(("pipeline_parallel_size", "tensor_parallel_size"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_stages_on_ranks_give_the_uncut_models_outputs(
    tmp_path: Path, pipeline_parallel_size: int, tensor_parallel_size: int
) -> None:
    """One, two and three laps; runs of different length; runs that are broken off by their reader or their source."""
    num_ranks = str(pipeline_parallel_size * tensor_parallel_size)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(SCRIPT), str(tensor_parallel_size)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    said = [f"equal over {pipeline_parallel_size} ranks × {num_laps} laps" for num_laps in (1, 2, 3)]
    assert result.stdout.splitlines() == said


SPECS = st.dictionaries(
    st.text(min_size=1),
    st.tuples(
        st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]),
    ),
    max_size=4,
)


@given(SPECS)
def test_specs_come_back_from_their_numbers(specs: dict[str, Any]) -> None:
    assert decode_specs(encode_specs(specs)) == specs


class Silence:
    """A channel whose other end never says anything; what was sent is counted."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []

    def send_numbers(self, numbers: Sequence[int], rank: int) -> None:
        self.sent.append(list(numbers))

    def send_to(self, rank: int, tensor: torch.Tensor) -> None: ...

    def send_onward(self, tensors: Sequence[torch.Tensor]) -> None: ...

    def receive_result(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("the other rank is gone")

    def flush(self) -> None: ...


class Doubling:
    """The first of two stages; fails at a negative number."""

    inputs = ("x",)
    received = ()
    sent = (Crossing("x", torch.float32, ("x[0]",)),)

    def __call__(
        self, step: None, inputs: Mapping[str, torch.Tensor], received: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        if bool((inputs["x"] < 0).any()):
            raise ArithmeticError("negative")
        return [inputs["x"] * 2]


def runner_of(num_ranks: int) -> tuple[BatchRunner, Silence]:
    """The leader of so many ranks, none of which is there."""
    topology: Any = SimpleNamespace(
        rank=0,
        stage=0,
        num_stages=num_ranks,
        world_size=num_ranks,
        device=torch.device("cpu"),
        tensor_parallel=SimpleNamespace(rank=0, size=1),
    )
    channel: Any = Silence()
    reads = [("x",), *[()] * (num_ranks - 1)]
    return BatchRunner([Doubling()], channel, topology, reads, Doubling.sent[0]), channel


@pytest.mark.parametrize(("value", "failure"), [(-1.0, ArithmeticError), (1.0, RuntimeError)])
def test_error_in_a_step_is_raised_and_no_run_begins_after_it(value: float, failure: type[Exception]) -> None:
    """Whether it is this rank's own or another's: the others wait for what will not come."""
    runner, channel = runner_of(2)
    with pytest.raises(failure):
        list(runner.run([{"x": torch.full((3,), value)}]))
    assert runner.is_broken
    num_sent = len(channel.sent)
    with pytest.raises(EngineError, match="out of step"):
        list(runner.run([{"x": torch.ones(3)}]))
    runner.sign_of_life()
    assert len(channel.sent) == num_sent


def test_progress_is_told_while_a_result_is_waited_for_and_changes_with_each() -> None:
    runner, channel = runner_of(2)
    seen: list[int | None] = []

    def receive_result(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        seen.append(runner.progress)
        return torch.zeros(*shape, dtype=dtype)

    channel.receive_result = receive_result  # type: ignore[method-assign]
    between = [runner.progress]
    for _ in runner.run([{"x": torch.ones(3)}] * 4):
        between.append(runner.progress)
    assert seen == [0, 1, 2, 3]
    assert between == [None] * 5


def test_error_on_a_lone_rank_harms_no_later_run() -> None:
    runner, _ = runner_of(1)
    with pytest.raises(ArithmeticError):
        list(runner.run([{"x": torch.ones(3)}, {"x": -torch.ones(3)}, {"x": torch.ones(3)}]))
    assert not runner.is_broken
    (output,) = runner.run([{"x": torch.ones(3)}])
    assert output.tolist() == [2, 2, 2]


def test_output_may_be_written_to() -> None:
    runner, _ = runner_of(1)
    (output,) = runner.run([{"x": torch.ones(3)}])
    assert output.add_(1).tolist() == [3, 3, 3]
