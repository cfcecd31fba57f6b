"""Stages built for a GPU, run as fake tensors where there is none: no CPU tensor meets one of the GPU's, nothing is
asked of the GPU, and a step is as few launches as it is said to be.

Fake tensors have a device, a shape and no numbers; the Triton kernels are noted instead of launched.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

import pytest
import torch
from families import TINY_FAMILIES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from whole_model import ALONE

from ts_parallel.partition.build import cut_causal_lm, program_of, shard_causal_lm
from ts_parallel.partition.program import POSITIONS, ROWS, TOKEN_IDS, PipelinePlace, RankProgram, StageCode
from ts_parallel.runtime.backends.kv_memory import KVMemory
from ts_parallel.runtime.stage import Stage
from ts_parallel.step_plan import Chunk, StepPlan

pytest.importorskip("triton", reason="Triton is not installed")

from ts_parallel.runtime.backends.cuda.attention import CudaAttention
from ts_parallel.runtime.backends.cuda.backend import CudaBackend
from ts_parallel.runtime.backends.cuda.kernels import attention as attention_kernels
from ts_parallel.runtime.backends.cuda.kernels import elementwise
from ts_parallel.runtime.backends.cuda.step_numbers import StepNumbers, StepWriter

GPU = torch.device("cuda", 0)
KERNELS = {
    attention_kernels: ("turn_and_write", "attend_tiles", "attend_splits", "join_splits"),
    elementwise: ("rms_norm", "gate"),
}
FAMILIES = ["llama", "qwen3", "gemma2", "olmo2", "phi3", "cohere", "gpt_oss", "granite"]
# Operations that only make memory, or look at it otherwise.
FREE = {"aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default", "aten.detach.default"}

DECODE = StepPlan(tuple(Chunk(name, (3,), 5, (number,), is_sampled=True) for number, name in enumerate("abc")))
PROMPTS = StepPlan(
    (Chunk("a", (1, 2, 3), 0, (0,), is_sampled=True), Chunk("b", (4,), 2, (1,), is_sampled=False)),
)


class Launches:
    """In the place of a kernel: notes each launch, whose tensors must all be the GPU's."""

    def __init__(self, name: str, noted: Counter[str]) -> None:
        self._name, self._noted = name, noted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            devices = {value.device for value in arguments if isinstance(value, torch.Tensor)}
            assert devices == {GPU}, f"{self._name} is given tensors of {devices}"
            assert all(number > 0 for number in grid)
            self._noted[self._name] += 1

        return launch


class Operations(TorchDispatchMode):
    """Notes each operation of torch that is a launch."""

    def __init__(self, noted: Counter[str]) -> None:
        super().__init__()
        self._noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(result.alias_info is not None for result in func._schema.returns)
        if not is_view and str(func) not in FREE:
            self._noted[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counts: Counter[str] = Counter()
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Launches(name, counts))
    return counts


def program(family: str) -> RankProgram:
    sharded = shard_causal_lm(TINY_FAMILIES[family](), torch.bfloat16, ALONE)
    return program_of(cut_causal_lm(sharded, PipelinePlace()), PipelinePlace(), {})


def on_gpu(step: StepNumbers) -> StepNumbers:
    """Fake tensors of the same shapes."""
    own = {each.name: getattr(step, each.name) for each in fields(step)}
    return StepNumbers(
        **{
            name: torch.empty(value.shape, dtype=value.dtype, device=GPU) if isinstance(value, torch.Tensor) else value
            for name, value in own.items()
        }
    )


def run(made: RankProgram, plan: StepPlan, noted: Counter[str]) -> tuple[torch.Tensor, Counter[str]]:
    """The logits of a step, fake, and what was launched for them."""
    code: StageCode = made.stages[0]
    step = StepWriter(8, 16, 16, torch.device("cpu")).write(plan)
    with FakeTensorMode():
        tensors: dict[str, Any] = {
            name: torch.empty(value.shape, dtype=value.dtype, device=GPU) for name, value in made.buffers.items()
        }
        for name, entry in made.plan.parameters.items():
            memory = torch.empty(entry.local_shape(0), dtype=entry.dtype, device=GPU)
            tensors |= dict.fromkeys((name, *entry.aliases), memory)
        sites = made.sites_of_ranks[0]
        attention = CudaAttention(sites, KVMemory(sites, 8, 16, torch.bfloat16, GPU), 16, num_processors=132)
        stage = Stage(code, tensors, ALONE, CudaBackend(()), attention)
        own = on_gpu(step)
        inputs = {TOKEN_IDS: own.token_ids, POSITIONS: own.positions, ROWS: own.sampled_rows}
        noted.clear()
        with Operations(noted), torch.inference_mode():
            (logits,) = stage(own, inputs)
    return logits, Counter(noted)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_of_a_stage_for_a_gpu_stays_there_and_asks_nothing(family: str, noted: Counter[str]) -> None:
    """What would wait for the GPU, or copy to it, is refused by fake tensors, or counted here."""
    made = program(family)
    for plan, num_rows in ((DECODE, 4), (PROMPTS, 1)):
        logits, launched = run(made, plan, noted)
        assert logits.device == GPU and logits.shape == (1, num_rows, made.head_sizes[0])
        assert launched["turn_and_write"] == len(made.sites_of_ranks[0])
        assert launched["attend_tiles"] == (0 if plan is DECODE else len(made.sites_of_ranks[0]))
        assert not {name for name in launched if "_local_scalar_dense" in name or "nonzero" in name}


def test_decode_step_of_a_llama_is_ten_launches_a_layer(noted: Counter[str]) -> None:
    made = program("llama")
    num_layers = len(made.sites_of_ranks[0])
    _, launched = run(made, DECODE, noted)
    of_layers = {
        "rms_norm": 2 * num_layers + 1,  # and the last
        **dict.fromkeys(("turn_and_write", "attend_splits", "join_splits", "gate"), num_layers),
    }
    assert {name: launched[name] for name in of_layers} == of_layers
    products = sum(count for name, count in launched.items() if "mm" in name or "linear" in name)
    assert products == 4 * num_layers + 1  # and the head
    others = launched.total() - sum(of_layers.values()) - products
    assert others <= 12  # of the embedding and the angles, once a step
