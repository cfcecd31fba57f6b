"""Sublayers as one call give the numbers of their parts, bit by bit, and the parts where they cannot be one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import TINY_FAMILIES, save_random_model
from places import RANKS
from whole_model import build_rank_model, runner_of

from ts_parallel.cli.server.torchserve import free_ports
from ts_parallel.native import HAS_KERNELS, kernels_for
from ts_parallel.partition.graph import stage_code
from ts_parallel.partition.prepared import CACHE_VARIABLE
from ts_parallel.partition.program import AttentionSublayer, GatedSublayer, SublayerStack
from ts_parallel.runtime.backends.native import sublayers
from ts_parallel.step_plan import Chunk, StepPlan
from ts_parallel.topology import Topology, open_topology

SCRIPT = RANKS / "stack.py"
BLOCKS = (5, 2, 9, 0, 7, 1)


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    topology = open_topology(1, "cpu", environment={}, num_threads=2)
    yield topology
    topology.close()


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    """A runner over kernels leaves torch one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def logits_of(folder: Path, topology: Topology, dtype: str) -> tuple[torch.Tensor, set[type]]:
    """A prefill in two chunks, two sequences a step after it; and what kinds of calls the stage has."""
    part = build_rank_model(folder, dtype, topology.tensor_parallel, topology.device, packs=True)
    runner = runner_of(part, topology, block_size=16, kv_cache_bytes=2**22, max_model_len=90)
    token_ids = torch.randint(part.program.head_sizes[0], (60,), generator=torch.Generator().manual_seed(0)).tolist()
    steps = [[(0, 33)], [(33, 50)], *([(at, at + 1)] for at in range(50, 54)), [(54, 55), (0, 21)]]
    found = []
    for step in steps:
        chunks = [
            Chunk(str(number), tuple(token_ids[start:end]), start, BLOCKS[3 * number :], is_sampled=True)
            for number, (start, end) in enumerate(step)
        ]
        found.append(runner.logits(StepPlan(tuple(chunks))))
    return torch.cat(found), {type(entry) for entry in part.program.stages[0].globals.values()}


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(
            (name, "bfloat16")
            for name in ("llama", "mistral", "qwen2", "gemma2", "gemma", "llama (one key/value head)")
        ),
        *((name, "float16") for name in ("llama", "gemma2")),
    ],
)
def test_sublayers_give_the_numbers_of_their_parts(
    family: str, dtype: str, is_whole: bool, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the kernels cannot do one as a whole. Gemma 2 has norms between, so that there is no stack."""
    config = TINY_FAMILIES[family](max_position_embeddings=256)
    save_random_model(tmp_path, config, dtype=torch.bfloat16)
    expected = {AttentionSublayer, GatedSublayer} if family == "gemma2" else {SublayerStack}
    name = "run_sublayer" if family == "gemma2" else "run_stack"
    kernels = kernels_for(getattr(torch, dtype))
    calls, run = 0, getattr(kernels, name, None)

    def counted(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        assert run is not None
        run(*arguments)

    if kernels:
        monkeypatch.setattr(kernels, name, counted)
    if not is_whole:
        monkeypatch.setattr(sublayers, "layer_of", lambda function, dtype: None)
    as_sublayers, kinds = logits_of(tmp_path, topology, dtype)
    assert kinds >= expected
    assert bool(calls) == (kernels is not None and is_whole)
    monkeypatch.setattr(stage_code, "find_sublayers", lambda graph, groups: dict(groups))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "programs"))  # this one is not for others
    as_parts, kinds = logits_of(tmp_path, topology, dtype)
    assert not kinds & {AttentionSublayer, GatedSublayer, SublayerStack}
    assert torch.equal(as_sublayers, as_parts)


@pytest.mark.ranks
@pytest.mark.skipif(not HAS_KERNELS, reason="no compiler, or this processor has no fast bfloat16")
def test_stack_over_ranks_gives_the_numbers_of_its_parts_and_notices_a_lost_rank(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    save_random_model(tmp_path, TINY_FAMILIES["llama"](max_position_embeddings=256), dtype=dtype)
    port = str(free_ports(1)[0])
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[1].returncode == -signal.SIGKILL
    lost = f"rank 1 (process {ranks[1].pid}) has ended, and this rank waited for it"
    assert outputs[0].splitlines() == ["one call for the stack", "the same bits", lost]
