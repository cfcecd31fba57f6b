"""One rank's steps over paged memory give the plain model's logits and tokens, however a sequence is cut and packed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import DEMO_MODEL, RANKS
from ranks import pipelined_runner as stages
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Phi3Config, PretrainedConfig, PreTrainedModel
from whole_model import build_rank_model, runner_of

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler, TokenOutput
from ts_parallel.errors import ConfigError, PlanError
from ts_parallel.partition.build import eager_program, shard_causal_lm
from ts_parallel.runtime.runner import Runner, check_plan, refuse_unpageable
from ts_parallel.step_plan import Chunk, SamplingParams, StepPlan
from ts_parallel.topology import TensorParallelGroup, Topology, open_topology

SCRIPT = RANKS / "pipelined_runner.py"
BLOCK_SIZE = 8
BYTES_PER_TOKEN = 6 * 2 * (40 + 40) * 4  # layers × key/value heads × head dims × float32


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    topology = open_topology(1, "cpu", environment={}, num_threads=1)
    yield topology
    topology.close()


def make_runner(topology: Topology, num_blocks: int) -> Runner:
    part = build_rank_model(DEMO_MODEL, "float32", topology.tensor_parallel, topology.device)
    num_bytes = num_blocks * BLOCK_SIZE * BYTES_PER_TOKEN
    return runner_of(part, topology, block_size=BLOCK_SIZE, kv_cache_bytes=num_bytes, max_model_len=32)


@pytest.fixture(scope="module")
def runner(topology: Topology) -> Runner:
    return make_runner(topology, num_blocks=40)


def run(runner: Runner, plan: StepPlan) -> list[int]:
    runner.submit(plan)
    return runner.collect()


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(2048, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


# Blocks of each sequence, so that none lies at the start or in order.
BLOCKS = {"a": (7, 3, 30, 12), "b": (0, 39, 1, 2), "c": (20, 5, 4, 6)}
TOKENS = {"a": prompt(32, 1), "b": prompt(32, 2), "c": prompt(32, 3)}


def chunk(name: str, start: int, end: int, is_sampled: bool = True) -> Chunk:
    blocks = BLOCKS[name][: -(-end // BLOCK_SIZE)]
    return Chunk(name, TOKENS[name][start:end], start, blocks, is_sampled)


SCHEDULES = {
    "whole": [[("a", 0, 19)]],
    "chunks": [[("a", 0, 5)], [("a", 5, 13)], [("a", 13, 14)], [("a", 14, 32)]],
    "packed": [[("a", 0, 9), ("b", 0, 1), ("c", 0, 17)]],
    "one by one": [[("a", position, position + 1)] for position in range(10)],
    "prefill beside decodes": [
        [("a", 0, 9), ("b", 0, 3)],
        [("b", 3, 4), ("c", 0, 12), ("a", 9, 10)],
        [("c", 12, 20), ("a", 10, 11), ("b", 4, 12)],
        [("a", 11, 12), ("b", 12, 13), ("c", 20, 21)],
    ],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_are_the_plain_models_however_the_tokens_are_cut(
    runner: Runner, plain: PreTrainedModel, schedule: str
) -> None:
    with torch.no_grad():
        expected = {name: plain(torch.tensor([tokens])).logits[0] for name, tokens in TOKENS.items()}
    for step in SCHEDULES[schedule]:
        logits = runner.logits(StepPlan(tuple(chunk(*bounds) for bounds in step)))
        wanted = torch.stack([expected[name][end - 1] for name, _, end in step])
        assert logits.shape == wanted.shape
        assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_only_sampled_chunks_get_a_token(runner: Runner, plain: PreTrainedModel) -> None:
    plan = StepPlan((chunk("a", 0, 5), chunk("b", 0, 7, is_sampled=False), chunk("c", 0, 1)))
    with torch.no_grad():
        wanted = [
            int(plain(torch.tensor([TOKENS[name][:end]])).logits[0, -1].argmax()) for name, end in (("a", 5), ("c", 1))
        ]
    assert run(runner, plan) == wanted
    assert run(runner, StepPlan((chunk("a", 0, 5, is_sampled=False),))) == []


GOOD = Chunk("a", (1, 2, 3), 7, (0, 4), is_sampled=True, next_ids=(2, 9))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token_ids": (1, 10, 3)}, "token id 10 is not below 10"),
        ({"token_ids": (1, -1, 3)}, "token id -1 is negative"),
        ({"next_ids": (2, 2**40)}, f"token id {2**40} is not below 10"),
        ({"next_ids": (2, 3, 4, 5)}, "4 rows of 3 tokens are wanted"),
        ({"block_ids": (0, 5)}, "block ids 0 to 5 are not within 0 to 4"),
        ({"block_ids": (-2, 4)}, "block ids -2 to 4 are not within 0 to 4"),
        ({"block_ids": (4,)}, "tokens 7 to 10 have 8 slots"),
        ({"start": -1}, "tokens -1 to 2 have 16 slots"),
        ({"start": 14}, "tokens 14 to 17 have 16 slots"),
        ({"token_ids": ()}, "tokens 7 to 7 have 16 slots"),
    ],
)
def test_what_is_no_address_is_named_before_anything_is_computed(wrong: dict[str, Any], message: str) -> None:
    check_plan(StepPlan((GOOD,)), num_blocks=5, block_size=8, vocabulary=10)
    with pytest.raises(AssertionError, match=f"^{message}$"):
        check_plan(StepPlan((GOOD, replace(GOOD, **wrong))), num_blocks=5, block_size=8, vocabulary=10)


def test_every_step_of_a_runner_is_checked(runner: Runner) -> None:
    for wrong in (replace(chunk("a", 0, 5), block_ids=(40,)), replace(chunk("a", 0, 5), token_ids=(1, 2048))):
        for run_plan in (runner.submit, runner.logits):
            with pytest.raises(AssertionError):
                run_plan(StepPlan((wrong,)))


def test_sign_of_life_leaves_nothing_to_collect(runner: Runner) -> None:
    runner.submit(StepPlan((chunk("a", 0, 5),)))
    runner.submit(StepPlan())
    runner.collect()
    with pytest.raises(IndexError):
        runner.collect()


def test_steps_are_collected_in_order(runner: Runner) -> None:
    plans = [StepPlan((chunk(*bounds),)) for bounds in (("a", 0, 5), ("b", 0, 7), ("c", 0, 1))]
    alone = [run(runner, plan) for plan in plans]
    for plan in plans:
        runner.submit(plan)
    assert [runner.collect() for _ in plans] == alone
    assert len(set(map(tuple, alone))) > 1


def test_token_is_drawn_with_its_own_chunks_parameters_and_position(runner: Runner) -> None:
    def draw(sampling: SamplingParams, end: int) -> int:
        greedy = chunk("b", 0, 3)
        return run(runner, StepPlan((greedy, replace(chunk("a", 0, end), sampling=sampling))))[1]

    hot = [SamplingParams(temperature=2.0, seed=seed) for seed in range(8)]
    assert len({draw(sampling, 4) for sampling in hot}) > 1
    assert [draw(sampling, 4) for sampling in hot] == [draw(sampling, 4) for sampling in hot]
    assert len({draw(SamplingParams(), 4) for _ in range(3)}) == 1


@pytest.mark.parametrize("remembers", [False, True])
def test_preempted_request_produces_the_same_tokens(
    topology: Topology, plain: PreTrainedModel, remembers: bool
) -> None:
    """Blocks for one request and a half; prompts longer than a step."""
    plans: list[StepPlan] = []
    runner = make_runner(topology, num_blocks=4)
    blocks = BlockManager(runner.num_blocks, BLOCK_SIZE, caches_prefixes=remembers)
    scheduler = Scheduler(blocks, max_num_seqs=4, max_num_batched_tokens=10)

    class NotingRunner:
        num_stages = 1
        collect = runner.collect

        def submit(self, plan: StepPlan) -> None:
            plans.append(plan)
            runner.submit(plan)

    requests = [Request(str(length), prompt(length, seed=length), max_tokens=8) for length in (14, 3, 11)]
    outputs = Engine(NotingRunner(), scheduler).generate(requests)
    num_starts = sum(chunk.start == 0 for plan in plans for chunk in plan.chunks)
    assert remembers or num_starts > len(requests)  # some started over, from the beginning where nothing is remembered
    for request, output in zip(requests, outputs, strict=True):
        assert len(output) == 8
        with torch.no_grad():
            logits = plain(torch.tensor([[*request.prompt_ids, *output]])).logits[0]
        assert output == logits[len(request.prompt_ids) - 1 : -1].argmax(dim=-1).tolist()


def likelihoods(plain: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """`[T - 1, V]`: the plain model's log-probabilities of what follows each token."""
    with torch.no_grad():
        logprobs: torch.Tensor = plain(torch.tensor([token_ids])).logits[0, :-1].log_softmax(dim=-1)
    return logprobs


@pytest.mark.parametrize("num_blocks", [4, 40])
def test_logprobs_of_prompt_and_answer_are_the_plain_models_however_the_steps_go(
    topology: Topology, plain: PreTrainedModel, num_blocks: int
) -> None:
    """Prompts longer than a step, one of them asked twice, with preemptions and without."""
    runner = make_runner(topology, num_blocks)
    scheduler = Scheduler(BlockManager(num_blocks, BLOCK_SIZE), max_num_seqs=4, max_num_batched_tokens=10)
    engine, outputs = Engine(runner, scheduler), list[TokenOutput]()
    asking = SamplingParams(temperature=1.0, num_logprobs=3)
    prompts = [prompt(length, seed=length) for length in (19, 14, 19, 1)]
    requests = [Request(str(n), own, 6, asking, scores_prompt=n > 0) for n, own in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    while engine.has_requests:
        engine.step(deliver=outputs.extend)
    for request in requests:
        expected = likelihoods(plain, [*request.prompt_ids, *request.output_ids])
        own = [output.logprobs for output in outputs if output.request_id == request.request_id]
        assert len(own) == 6 and len(request.prompt_logprobs) == (len(request.prompt_ids) - 1) * request.scores_prompt
        found = [logprobs for logprobs in (*request.prompt_logprobs, *own) if logprobs is not None]
        following = [*request.prompt_ids, *request.output_ids][-len(found) :]
        for row, token_id, logprobs in zip(expected[-len(found) :], following, found, strict=True):
            assert logprobs.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
            assert [value for _, value in logprobs.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert requests[0].num_cached == requests[2].num_cached == 0  # whose prompt is scored has none of its rows yet


class Countdown:
    """A guide that lets each token be one of three, by how many there are already, and ends after seven."""

    error = None

    def __init__(self) -> None:
        self.token_ids: list[int] = []

    @property
    def is_finished(self) -> bool:
        return len(self.token_ids) == 7

    def allowed(self) -> bytes:
        bits = sum(1 << token_id for token_id in self.choices(len(self.token_ids)))
        return bits.to_bytes(256, "little")

    def accept(self, token_id: int) -> None:
        self.token_ids.append(token_id)

    def choices(self, number: int) -> tuple[int, ...]:
        return tuple((number * 97 + step) % 2048 for step in (3, 700, 1999))


@pytest.mark.parametrize("num_blocks", [4, 40])
def test_guided_answer_takes_the_best_of_what_is_allowed_even_after_a_preemption(
    topology: Topology, plain: PreTrainedModel, num_blocks: int
) -> None:
    runner = make_runner(topology, num_blocks)
    scheduler = Scheduler(BlockManager(num_blocks, BLOCK_SIZE), max_num_seqs=4, max_num_batched_tokens=10)
    guides = [Countdown() for _ in range(3)]
    requests = [Request(str(n), prompt(12, seed=n), 20, guide=guide) for n, guide in enumerate(guides)]
    outputs = Engine(runner, scheduler).generate(requests)
    assert scheduler.figures().stats.num_preemptions > 0 or num_blocks == 40
    for request, guide, output in zip(requests, guides, outputs, strict=True):
        assert output == guide.token_ids and len(output) == 7
        rows = likelihoods(plain, [*request.prompt_ids, *output])[-7:]
        assert output == [max(guide.choices(at), key=lambda token: row[token]) for at, row in enumerate(rows)]


@pytest.mark.ranks
@pytest.mark.parametrize(("num_stages", "tensor_parallel_size"), [(1, 2), (2, 2), (3, 1)])
def test_stages_give_the_tokens_and_logits_of_one_rank(
    topology: Topology, tmp_path: Path, num_stages: int, tensor_parallel_size: int
) -> None:
    """Hot and greedy requests, prompts longer than a step, blocks for few of them at once."""
    num_ranks = num_stages * tensor_parallel_size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    arguments = [
        str(SCRIPT),
        str(DEMO_MODEL),
        str(tmp_path / "report.json"),
        str(num_stages),
        str(tensor_parallel_size),
    ]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    alone = stages.lead(stages.make_runner(DEMO_MODEL, topology))
    assert report["tokens"] == alone["tokens"]
    assert len(report["logprobs"]) > 100
    assert report["logprobs"] == pytest.approx(alone["logprobs"], rel=1e-4)
    logits, wanted = torch.tensor(report["logits"]), torch.tensor(alone["logits"])
    assert logits.shape == wanted.shape == (2, 2048)
    assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_memory_becomes_as_many_blocks_as_fit(topology: Topology) -> None:
    assert make_runner(topology, num_blocks=5).num_blocks == 5
    with pytest.raises(ConfigError, match="fewer than max_model_len 32"):
        make_runner(topology, num_blocks=3)


TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def refuse(config: PretrainedConfig, max_model_len: int) -> None:
    sharded = shard_causal_lm(config, torch.bfloat16, TensorParallelGroup(0, 1))
    refuse_unpageable(eager_program(sharded), max_model_len)


def test_rotary_frequencies_that_change_with_the_batch_are_refused_where_they_do() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    config = Phi3Config(**TINY, original_max_position_embeddings=32, rope_parameters=rope)
    refuse(config, 32)
    with pytest.raises(ConfigError, match=r"'longrope' .* beyond 32 tokens: set max_model_len, now 33, to at most 32"):
        refuse(config, 33)


def test_attention_sinks_are_refused_with_the_models_name() -> None:
    refuse(LlamaConfig(**TINY), 64)
    config = GptOssConfig(**TINY, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(PlanError, match="GptOssForCausalLM has attention sinks"):
        refuse(config, 64)
