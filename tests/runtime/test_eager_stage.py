"""The model's own modules give what a traced stage and the plain model give, step after step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_random_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from whole_model import build_rank_model, runner_of

from ts_parallel.partition.build import build_eager_model
from ts_parallel.runtime.runner import Runner
from ts_parallel.step_plan import Chunk, StepPlan
from ts_parallel.topology import Topology, open_topology

TOKENS = {
    name: tuple(torch.randint(97, (24,), generator=torch.Generator().manual_seed(seed)).tolist())
    for seed, name in enumerate("ab")
}
BLOCKS = {"a": (3, 0, 5), "b": (1, 4, 2)}  # of 8 tokens
STEPS = [[("a", 0, 9), ("b", 0, 1)], [("b", 1, 8), ("a", 9, 10)], [("a", 10, 11), ("b", 8, 9)]]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    topology = open_topology(1, "cpu", environment={}, num_threads=1)
    yield topology
    topology.close()


def make_runner(folder: Path, topology: Topology, is_eager: bool) -> Runner:
    build = build_eager_model if is_eager else build_rank_model
    part = build(folder, "float32", topology.tensor_parallel, topology.device)
    return runner_of(part, topology, block_size=8, kv_cache_bytes=2**20, max_model_len=24)


def step(chunks: list[tuple[str, int, int]]) -> StepPlan:
    return StepPlan(
        tuple(Chunk(name, TOKENS[name][start:end], start, BLOCKS[name], True) for name, start, end in chunks)
    )


def expected(plain: PreTrainedModel, chunks: list[tuple[str, int, int]]) -> torch.Tensor:
    with torch.inference_mode():
        rows = [plain(torch.tensor([TOKENS[name][:end]])).logits[0, -1] for name, _, end in chunks]
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_eager_steps_are_those_of_the_traced_stage_and_of_the_plain_model(
    family: str, topology: Topology, tmp_path: Path
) -> None:
    save_random_model(tmp_path, FAMILIES[family](num_hidden_layers=2))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    eager, traced = make_runner(tmp_path, topology, True), make_runner(tmp_path, topology, False)
    for chunks in STEPS:
        logits = eager.logits(step(chunks))
        assert torch.equal(logits, traced.logits(step(chunks)))
        torch.testing.assert_close(logits, expected(plain, chunks), rtol=1e-4, atol=1e-4)


def test_step_that_broke_off_leaves_the_next_one_right(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attention calls are counted from the first site again."""
    save_random_model(tmp_path, FAMILIES["llama"](num_hidden_layers=2))
    runner = make_runner(tmp_path, topology, True)
    stage: Any = runner._stage
    wanted = runner.logits(step(STEPS[0]))

    def fail(*_: object, **__: object) -> None:
        raise ArithmeticError("broken")

    with monkeypatch.context() as broken:
        broken.setattr(stage._model.model.layers[0].mlp, "forward", fail)
        with pytest.raises(ArithmeticError):
            runner.logits(step(STEPS[0]))
    assert torch.equal(runner.logits(step(STEPS[0])), wanted)
