"""Whole steps by the CUDA backend, run by Triton's interpreter, filled up to sizes and recorded: torch's tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TINY_FAMILIES, save_random_model
from torch.utils._python_dispatch import TorchDispatchMode
from whole_model import build_rank_model

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.runtime.backends.base import Backend
from ts_parallel.runtime.backends.torch.backend import TorchBackend
from ts_parallel.runtime.runner import Runner
from ts_parallel.step_plan import Chunk, StepPlan
from ts_parallel.topology import Topology, open_topology

pytest.importorskip("triton", reason="Triton is not installed")

from ts_parallel.runtime.backends.cuda.backend import CudaBackend

aten = torch.ops.aten
# An answer from the device, or a shape that depends on one.
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default, aten.masked_select.default}

Outputs = list[torch.Tensor]
Operations = list[tuple[str, list[torch.Size]]]


class Watch(TorchDispatchMode):
    """Notes which operations make tensors of which shapes, and refuses those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Operations = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise RuntimeError(f"{func} waits for the device while a step is recorded")
        found = func(*args, **(kwargs or {}))
        made = found if isinstance(found, (list, tuple)) else [found]
        self.operations.append((str(func), [part.shape for part in made if isinstance(part, torch.Tensor)]))
        return found


class Recorder:
    """Records as CUDA graphs do: what is replayed are the operations that were recorded, on the memory of then."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        first, outputs = self._watched(function)
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            again, found = self._watched(function)
            assert again == first, "what was recorded cannot depend on the step's numbers"
            for target, source in zip(outputs, found, strict=True):
                target.copy_(source)

        return replay, outputs

    def _watched(self, function: Callable[[], Outputs]) -> tuple[Operations, Outputs]:
        with Watch() as watch:
            outputs = function()
        return watch.operations, outputs


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    topology = open_topology(1, "cpu", environment={}, num_threads=1)
    yield topology
    topology.close()


def make_runner(folder: Path, topology: Topology, backend: Backend) -> Runner:
    part = build_rank_model(folder, "float32", topology.tensor_parallel, topology.device)
    return Runner(part, topology, backend, block_size=4, kv_cache_bytes=2**18, max_model_len=40)


def tokens_of(runner: Runner) -> list[list[int]]:
    """Of requests that begin and end at different steps, some prompts longer than a step."""
    blocks = BlockManager(runner.num_blocks, runner.block_size, caches_prefixes=True)
    scheduler = Scheduler(blocks, max_num_seqs=3, max_num_batched_tokens=12)
    generator = torch.Generator().manual_seed(0)
    requests = [
        Request(str(length), tuple(torch.randint(90, (length,), generator=generator).tolist()), max_tokens=max_tokens)
        for length, max_tokens in ((15, 4), (3, 6), (1, 3))
    ]
    return Engine(runner, scheduler).generate(requests)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


# One whose layers are a stack, one with norms of heads, with windows and softcap, with experts.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])
def test_steps_filled_up_and_recorded_give_the_tokens_of_torch(
    family: str, topology: Topology, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_random_model(tmp_path, TINY_FAMILIES[family]())
    expected = tokens_of(make_runner(tmp_path, topology, TorchBackend()))
    recorder = Recorder()
    runner = make_runner(tmp_path, topology, CudaBackend((1, 2), recorder))
    assert tokens_of(runner) == expected
    if family != "mixtral":
        assert warnings(caplog) == []
        assert recorder.num_recorded == 2 and recorder.num_replayed > 2


def test_what_cannot_be_recorded_is_said_and_run_all_the_same(
    topology: Topology, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        raise RuntimeError("operation not permitted when stream is capturing")

    save_random_model(tmp_path, TINY_FAMILIES["llama"]())
    runner = make_runner(tmp_path, topology, CudaBackend((1, 2), refuse))
    assert warnings(caplog) == [
        "steps are not recorded, so each operation is launched by itself: operation not permitted when stream is "
        "capturing"
    ]
    assert tokens_of(runner) == tokens_of(make_runner(tmp_path, topology, TorchBackend()))


def test_logits_of_a_step_are_its_own_after_the_next(topology: Topology, tmp_path: Path) -> None:
    """And only those of its chunks, however far it was filled up."""
    save_random_model(tmp_path, TINY_FAMILIES["llama"]())
    found = []
    for backend in (TorchBackend(), CudaBackend((4,), Recorder())):
        runner = make_runner(tmp_path, topology, backend)
        chunks = [Chunk(str(token), (token,), 0, (token,), is_sampled=True) for token in range(1, 7)]
        found.append([runner.logits(StepPlan(tuple(chunks[first : first + 3]))) for first in (0, 3)])
    assert [part.shape for part in found[1]] == [part.shape for part in found[0]]
    torch.testing.assert_close(torch.cat(found[1]), torch.cat(found[0]), rtol=1e-5, atol=1e-5)
