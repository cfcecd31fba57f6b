"""Greedy float32 tokens are those of transformers' `generate` for every mix of chunks, prefix hits and preemption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_random_model
from transformers import AutoModelForCausalLM

from ts_parallel.config import parse_config
from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.causal_lm import make_runner
from ts_parallel.topology import Topology, open_topology

BLOCK_SIZE, MAX_TOKENS = 4, 20
FAMILIES_OF_MIXES = ("llama", "gemma2", "mistral")  # the last two with windows shorter than the prompts


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    topology = open_topology(1, "cpu", environment={}, num_threads=1)
    yield topology
    topology.close()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of five, three begin alike, and two of those more so."""
    generator = torch.Generator().manual_seed(0)
    start, rest, *ends = (
        torch.randint(97, (length,), generator=generator).tolist() for length in (13, 9, 3, 11, 6, 30, 1)
    )
    return [start + rest + ends[0], start + rest + ends[1], start + ends[2], ends[3], ends[4]]


@pytest.fixture(scope="module", params=FAMILIES_OF_MIXES)
def model(
    request: pytest.FixtureRequest,
    prompts: list[list[int]],
    topology: Topology,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Runner, list[list[int]]]:
    """A runner, and transformers' own answers, each prompt alone."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_random_model(folder, FAMILIES[request.param]())
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": MAX_TOKENS, "pad_token_id": 0}
        answers.append(plain.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    section = {"model_path": str(folder), "dtype": "float32", "device": "cpu", "block_size": BLOCK_SIZE}
    config = parse_config({**section, "max_model_len": 64, "kv_cache_memory": "1MiB"})
    return make_runner(config, folder, topology), answers


@pytest.mark.parametrize("is_preempted", [False, True])
@pytest.mark.parametrize("caches_prefixes", [False, True])
@pytest.mark.parametrize("max_num_batched_tokens", [3, 16, 256])
def test_tokens_are_the_plain_models_for_every_mix(
    model: tuple[Runner, list[list[int]]],
    prompts: list[list[int]],
    max_num_batched_tokens: int,
    caches_prefixes: bool,
    is_preempted: bool,
) -> None:
    """Each mix is asked twice, and the first time of a prefix is computed beside its second."""
    runner, answers = model
    num_blocks = 16 if is_preempted else runner.num_blocks  # 16 are enough for one request
    blocks = BlockManager(num_blocks, BLOCK_SIZE, caches_prefixes=caches_prefixes)
    scheduler = Scheduler(blocks, max_num_seqs=4, max_num_batched_tokens=max_num_batched_tokens)
    engine = Engine(runner, scheduler)
    for turn in range(2):
        requests = [Request(f"{turn}-{at}", tuple(prompt), MAX_TOKENS) for at, prompt in enumerate(prompts)]
        assert engine.generate(requests) == answers
    assert len(set(map(tuple, answers))) == len(prompts), "all prompts are answered alike: a weak test"
    stats = engine.figures().stats
    assert (stats.num_prefix_hits > 0) == caches_prefixes
    assert (stats.num_preemptions > 0) == is_preempted
    assert blocks.num_free == num_blocks
