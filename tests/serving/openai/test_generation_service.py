"""Bodies in, answers out, with a real model and engine but without TorchServe: what each field of a request does."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from http_client import events
from places import DEMO_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

from ts_parallel.config import HandlerConfig, parse_config
from ts_parallel.engine.engine import EngineThread
from ts_parallel.engine.request import Request
from ts_parallel.serving import causal_lm
from ts_parallel.serving.exchange import RawRequest, Reply
from ts_parallel.serving.openai.generation_service import GenerationService
from ts_parallel.step_plan import Chunk, SamplingParams, StepPlan
from ts_parallel.topology import open_topology

PROMPT = "Return a new list containing"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


class StoppableRunner:
    """A runner whose steps may be held up, and that fails once it is told to, which ends the engine's thread."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.num_stages = runner.num_stages
        self.num_blocks, self.block_size = runner.num_blocks, runner.block_size
        self.is_open = threading.Event()
        self.is_open.set()
        self.fails = False

    def submit(self, plan: StepPlan) -> None:
        self.is_open.wait(30)
        assert not self.fails
        self._runner.submit(plan)

    def collect(self) -> list[int]:
        numbers: list[int] = self._runner.collect()
        return numbers


@dataclass
class Bench:
    service: GenerationService
    engine: Any
    runner: StoppableRunner
    numbers: Iterator[int]

    def send(self, route: str, body: dict[str, Any]) -> tuple[int, str]:
        """Status and text of a whole answer."""
        name = f"r{next(self.numbers)}"
        return self.read(name, self.service.open_job(name, RawRequest(route, body, "application/json")))

    def read(self, name: str, opened: Any) -> tuple[int, str]:
        """Status and text of all that an open job says."""
        if isinstance(opened, Reply):
            return opened.status, opened.body
        status, text = 0, ""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self.service.engine.router.wait(0.1)
            reply = opened.advance(self.service.engine.router.take(name))
            if reply is not None:
                status, text = status or reply.status, text + reply.body
                if reply.is_last:
                    self.service.engine.abort(name)
                    return status, text
        raise AssertionError(f"no end after {text!r}")

    def ask(self, route: str, **body: Any) -> dict[str, Any]:
        status, text = self.send(route, body)
        assert status == 200, text
        answer: dict[str, Any] = json.loads(text)
        return answer

    def complete(self, **body: Any) -> dict[str, Any]:
        """The only choice of a greedy completion."""
        (choice,) = self.ask("v1/completions", **{"prompt": PROMPT, "temperature": 0, **body})["choices"]
        own: dict[str, Any] = choice
        return own

    def refuse(self, route: str = "v1/completions", **body: Any) -> dict[str, Any]:
        status, text = self.send(route, {"prompt": PROMPT, **body})
        assert status == 400, text
        error: dict[str, Any] = json.loads(text)["error"]
        return error

    def is_empty(self) -> bool:
        """Whether nobody holds a KV block, once the engine has heard of everything."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            occupancy = self.service.engine.figures().occupancy
            if not occupancy.num_running and not occupancy.num_waiting and not occupancy.kv_cache_usage:
                return not self.service.engine.num_open
            time.sleep(0.01)
        return False


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    topology = open_topology(1, "cpu", environment={}, num_threads=1)
    section = {"model_path": str(DEMO_MODEL), "dtype": "float32", "kv_cache_memory": "16MiB", "max_num_seqs": 8}
    config: HandlerConfig = parse_config({**section, "max_num_batched_tokens": 24, "max_num_waiting": 8})
    runner = StoppableRunner(causal_lm.make_runner(config, DEMO_MODEL, topology))
    engine = causal_lm.make_engine(runner, config)  # type: ignore[arg-type]
    thread = EngineThread(engine, on_failure=lambda: None)
    service = GenerationService(DEMO_MODEL, "demo", thread, config)
    service._tokenizer.chat_template = CHAT_TEMPLATE
    thread.start()
    bench = Bench(service, engine, runner, count())
    yield bench
    runner.fails = True
    runner.is_open.set()
    service.open_job("last", RawRequest("", "x", "text/plain"))
    thread._thread.join(10)
    topology.close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


@torch.inference_mode()
def logprobs_of(plain: Any, token_ids: list[int]) -> torch.Tensor:
    """`[T - 1, V]` of what follows each token."""
    logprobs: torch.Tensor = plain(torch.tensor([token_ids])).logits[0, :-1].log_softmax(dim=-1)
    return logprobs


HOT = {"temperature": 1.5, "top_k": -1, "max_tokens": 12}


def hot(bench: Bench, **body: Any) -> set[str]:
    """The answers of several seeds."""
    return {bench.complete(**HOT, seed=seed, **body)["text"] for seed in range(4)}


def test_temperature_and_seed_make_answers_differ(bench: Bench) -> None:
    greedy = bench.complete(max_tokens=12)["text"]
    assert len(hot(bench)) == 4
    assert hot(bench) == hot(bench)
    assert {bench.complete(seed=seed, max_tokens=12)["text"] for seed in range(3)} == {greedy}
    assert {bench.complete(**{**HOT, "temperature": 1e-3}, seed=3)["text"]} == {greedy}


@pytest.mark.parametrize("field", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_field_that_leaves_one_token_makes_hot_answers_greedy(bench: Bench, field: dict[str, Any]) -> None:
    texts = {bench.complete(**{**HOT, **field}, seed=seed)["text"] for seed in range(4)}
    assert texts == {bench.complete(max_tokens=12)["text"]}


def test_typical_p_that_leaves_one_token_makes_all_seeds_alike(bench: Bench) -> None:
    assert len(hot(bench, typical_p=1e-6)) == 1


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
def test_penalties_keep_an_answer_from_repeating_itself(bench: Bench, field: str) -> None:
    def num_distinct(**body: Any) -> float:
        tokens = bench.complete(max_tokens=60, logprobs=0, ignore_eos=True, **body)["logprobs"]["tokens"]
        return len(set(tokens))

    assert num_distinct(**{field: 2.0}) > num_distinct() > num_distinct(**{field: -2.0})


def test_repetition_penalty_changes_a_greedy_answer(bench: Bench) -> None:
    assert bench.complete(max_tokens=30, repetition_penalty=1.5)["text"] != bench.complete(max_tokens=30)["text"]


def test_ignored_end_is_a_token_like_others(bench: Bench) -> None:
    fields = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 12}
    ended = bench.ask("v1/chat/completions", **fields)
    assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] < 12
    longer = bench.ask("v1/chat/completions", ignore_eos=True, **fields)
    assert longer["choices"][0]["finish_reason"] == "length" and longer["usage"]["completion_tokens"] == 12
    assert bench.ask("v1/chat/completions", min_tokens=12, **fields)["usage"]["completion_tokens"] == 12


def test_answer_depends_on_its_own_seed_whoever_runs_beside_it(bench: Bench) -> None:
    alone = bench.complete(**HOT, seed=11)["text"]
    together = bench.ask("v1/completions", prompt=["x", PROMPT, "def f(", "A b c"], **HOT, seed=11)["choices"]
    assert together[1]["text"] == alone


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_come_with_their_numbers_and_the_first_is_that_of_n_1(bench: Bench, stream: bool) -> None:
    fields = {"prompt": PROMPT, **HOT, "seed": 5, "n": 3}
    single = bench.complete(**HOT, seed=5)["text"]
    whole = bench.ask("v1/completions", **fields)
    texts = [choice["text"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert texts[0] == single and len(set(texts)) == 3
    usage = whole["usage"]
    assert usage["completion_tokens"] == 36
    assert usage["prompt_tokens"] == bench.ask("v1/completions", prompt=PROMPT, max_tokens=1)["usage"]["prompt_tokens"]
    if stream:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last, done = events(bench.send("v1/completions", {**fields, **options})[1])
        pieces = [choice for chunk in chunks for choice in chunk["choices"]]
        assert ["".join(own["text"] for own in pieces if own["index"] == index) for index in range(3)] == texts
        assert sorted(own["index"] for own in pieces if own["finish_reason"]) == [0, 1, 2]
        assert (last["choices"], last["usage"]["completion_tokens"], done) == ([], 36, "[DONE]")
    assert bench.is_empty()


def test_answers_of_one_prompt_share_its_blocks(bench: Bench) -> None:
    prompt = [7 + number for number in range(40)]
    before = bench.service.engine.figures().stats.num_prefix_hits
    bench.ask("v1/completions", prompt=prompt, n=4, max_tokens=2)
    assert bench.service.engine.figures().stats.num_prefix_hits - before == 3 * 32


def test_chat_gives_n_messages_streamed_or_not(bench: Bench) -> None:
    fields = {"messages": [{"role": "user", "content": PROMPT}], **HOT, "seed": 5, "n": 2}
    whole = bench.ask("v1/chat/completions", **fields)
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 2
    *chunks, _ = events(bench.send("v1/chat/completions", {**fields, "stream": True})[1])
    pieces = [choice for chunk in chunks for choice in chunk["choices"]]
    for index, text in enumerate(texts):
        deltas = [own["delta"] for own in pieces if own["index"] == index]
        assert [delta.get("role") for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
        assert "".join(delta["content"] for delta in deltas) == text


def test_prompts_of_one_body_are_answered_in_their_order(bench: Bench) -> None:
    prompts = [PROMPT, "def f(self", "A longer text that says nothing, and goes on for a while"]
    alone = [bench.complete(prompt=prompt, max_tokens=9)["text"] for prompt in prompts]
    together = bench.ask("v1/completions", prompt=prompts, n=2, temperature=0, max_tokens=9)
    assert [choice["text"] for choice in together["choices"]] == [text for text in alone for _ in range(2)]
    assert [choice["index"] for choice in together["choices"]] == list(range(6))
    by_ids = bench.ask("v1/completions", prompt=[[9, 8, 7], [5]], temperature=0, max_tokens=9)["choices"]
    assert [choice["text"] for choice in by_ids] == [
        bench.complete(prompt=ids, max_tokens=9)["text"] for ids in ([9, 8, 7], [5])
    ]


def test_stop_string_ends_only_the_choice_that_has_it(bench: Bench) -> None:
    texts = [choice["text"] for choice in bench.ask("v1/completions", prompt=PROMPT, **HOT, seed=5, n=3)["choices"]]
    stop = texts[1][3:8]
    assert stop not in texts[0] and stop not in texts[2]
    stopped = bench.ask("v1/completions", prompt=PROMPT, **HOT, seed=5, n=3, stop=stop)["choices"]
    assert [choice["text"] for choice in stopped] == [texts[0], texts[1][: texts[1].index(stop)], texts[2]]
    assert [choice["finish_reason"] for choice in stopped] == ["length", "stop", "length"]
    assert bench.is_empty()


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"n": 9}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"prompt": ["x"] * 17}, "prompt"),
        ({"prompt": ["x", ""]}, "prompt"),
        ({"prompt": [[1], [99999]]}, "prompt"),
        ({"prompt": [2**70], "echo": True}, "prompt"),
        ({"prompt": [-1], "echo": True}, "prompt"),
        ({"logit_bias": {"2048": 1}}, "logit_bias"),
        ({"stop_token_ids": [2**70], "min_tokens": 2}, "stop_token_ids"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"min_tokens": 2**70}, "min_tokens"),
        ({"priority": 2**70}, "priority"),
        ({"prompt": "a\ud800b"}, "prompt"),
    ],
)
def test_what_no_choice_can_come_of_is_refused_and_nothing_is_left(
    bench: Bench, fields: dict[str, Any], parameter: str
) -> None:
    assert bench.refuse(**fields)["param"] == parameter
    assert bench.is_empty()


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion_are_the_plain_models(bench: Bench, plain: Any, tokenizer: Any, stream: bool) -> None:
    fields = {"prompt": PROMPT, "temperature": 1.0, "top_k": 20, "seed": 4, "max_tokens": 15, "logprobs": 3}
    fields["logit_bias"] = {"42": 5.0}  # which changes tokens, and no log-probability
    whole = bench.ask("v1/completions", **fields)["choices"][0]
    found = whole["logprobs"]
    if stream:
        *chunks, _ = events(bench.send("v1/completions", {**fields, "stream": True})[1])
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert {key: [own for part in parts for own in part[key]] for key in found} == found
    assert "".join(found["tokens"]) == whole["text"]
    assert [
        whole["text"].index(token, at) for token, at in zip(found["tokens"], found["text_offset"], strict=True)
    ] == (found["text_offset"])
    prompt_ids = tokenizer(PROMPT).input_ids
    own_ids = tokenizer.convert_tokens_to_ids([token.replace(" ", "Ġ").replace("\n", "Ċ") for token in found["tokens"]])
    rows = logprobs_of(plain, [*prompt_ids, *own_ids])[len(prompt_ids) - 1 :]
    expected = [float(row[token]) for row, token in zip(rows, own_ids, strict=True)]
    assert found["token_logprobs"] == pytest.approx(expected, abs=1e-3)
    for row, best, token, logprob in zip(
        rows, found["top_logprobs"], found["tokens"], found["token_logprobs"], strict=True
    ):
        assert best[token] == logprob
        assert sorted(best.values())[-3:] == pytest.approx(sorted(row.topk(3).values.tolist()), abs=1e-3)
        assert 3 <= len(best) <= 4


def test_logprobs_0_name_the_token_alone(bench: Bench) -> None:
    found = bench.complete(max_tokens=5, logprobs=0)["logprobs"]
    assert [list(best) for best in found["top_logprobs"]] == [[token] for token in found["tokens"]]
    assert bench.complete(max_tokens=5)["logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_chat_has_logprobs_with_bytes(bench: Bench, stream: bool) -> None:
    fields = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 9}
    fields |= {"logprobs": True, "top_logprobs": 2}
    if stream:
        *chunks, _ = events(bench.send("v1/chat/completions", {**fields, "stream": True})[1])
        choices = [chunk["choices"][0] for chunk in chunks]
        content = [own for choice in choices for own in choice["logprobs"]["content"]]
        text = "".join(choice["delta"]["content"] for choice in choices)
    else:
        choice = bench.ask("v1/chat/completions", **fields)["choices"][0]
        content, text = choice["logprobs"]["content"], choice["message"]["content"]
    assert bytes(byte for own in content for byte in own["bytes"] or ()).decode() == text
    for own in content:  # greedy: each is the most likely one
        first, second = own["top_logprobs"]
        assert first == {key: own[key] for key in ("token", "logprob", "bytes")}
        assert first["logprob"] >= second["logprob"]
    bare = bench.ask("v1/chat/completions", **{**fields, "top_logprobs": 0})["choices"][0]["logprobs"]["content"]
    assert [own["top_logprobs"] for own in bare] == [[]] * len(content)


def test_native_answer_has_logprobs_unless_it_is_a_stream_of_text(bench: Bench) -> None:
    whole = bench.ask("", prompt=PROMPT, max_tokens=6, logprobs=2, stream=False)
    assert whole["logprobs"] == bench.complete(max_tokens=6, logprobs=2)["logprobs"]
    assert "logprobs" not in bench.ask("", prompt=PROMPT, max_tokens=6, stream=False)
    assert bench.refuse("", logprobs=2)["param"] == "logprobs"


@pytest.mark.parametrize("is_included", [False, True])
def test_logprobs_tell_nothing_of_a_stop_string(bench: Bench, is_included: bool) -> None:
    whole = bench.complete(max_tokens=30, logprobs=1)
    tokens = whole["logprobs"]["tokens"]
    stop = "".join(tokens[8:11])
    at = whole["text"].index(stop)
    fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 30, "logprobs": 1, "stop": stop, "stream": True}
    *chunks, _ = events(bench.send("v1/completions", {**fields, "include_stop_str_in_output": is_included})[1])
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(choice["text"] for choice in choices)
    assert text == whole["text"][: at + len(stop) * is_included]
    out = ""
    for choice in choices:  # no token before its text
        out += choice["text"]
        for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
            assert out[offset:].startswith(token)
    assert "".join(token for choice in choices for token in choice["logprobs"]["tokens"]) == text


def test_echo_begins_with_the_prompt(bench: Bench, tokenizer: Any) -> None:
    answer = bench.complete(max_tokens=7)["text"]
    assert bench.complete(max_tokens=7, echo=True)["text"] == PROMPT + answer
    *chunks, _ = events(
        bench.send(
            "v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 7, "echo": True, "stream": True}
        )[1]
    )
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert pieces[0].startswith(PROMPT) and "".join(pieces) == PROMPT + answer
    ids = tokenizer(PROMPT).input_ids
    assert bench.complete(prompt=ids, max_tokens=7, echo=True)["text"] == PROMPT + answer
    body = bench.ask("v1/completions", prompt=[PROMPT, "x"], temperature=0, max_tokens=0, echo=True)
    assert [choice["text"] for choice in body["choices"]] == [PROMPT, "x"]
    assert body["usage"]["completion_tokens"] == 0
    assert bench.is_empty()


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_echo_with_logprobs_scores_every_token_of_the_prompt(
    bench: Bench, plain: Any, tokenizer: Any, max_tokens: int
) -> None:
    """A prompt of several steps, which is in the prefix cache the second time."""
    prompt = " ".join([PROMPT] * 11)
    ids = tokenizer(prompt).input_ids
    assert len(ids) > 2 * 24
    fields = {"prompt": prompt, "max_tokens": max_tokens, "logprobs": 2, "echo": True}
    choice, again = (bench.complete(**fields) for _ in range(2))
    assert choice == again
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(ids) + max_tokens
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    rows = logprobs_of(plain, ids)
    expected = [float(row[token]) for row, token in zip(rows, ids[1:], strict=True)]
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-3)
    for row, best in zip(rows, found["top_logprobs"][1:], strict=False):
        assert sorted(best.values())[-2:] == pytest.approx(sorted(row.topk(2).values.tolist()), abs=1e-3)
    visible = "".join(token for token in found["tokens"] if token not in tokenizer.all_special_tokens)
    assert visible == choice["text"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert token in tokenizer.all_special_tokens or choice["text"][offset:].startswith(token)


@pytest.fixture
def knowing(bench: Bench) -> Bench:
    """A service whose tokenizer knows a token that the model has not."""
    config = parse_config({"model_path": str(DEMO_MODEL), "dtype": "float32", "max_num_seqs": 8})
    service = GenerationService(DEMO_MODEL, "demo", bench.service.engine, config)
    service._tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    service._tokenizer.chat_template = CHAT_TEMPLATE
    return replace(bench, service=service)


def test_token_that_the_model_has_not_is_refused_by_name_wherever_it_comes_from(knowing: Bench) -> None:
    says = r"token id 2048 \('<\|extra\|>'\) at position (\d+) of (\w+) is outside the model's vocabulary of 2048"

    def place(message: str) -> tuple[int, str]:
        found = re.fullmatch(says, message)
        assert found, message
        return int(found[1]), found[2]

    at = knowing.ask("tokenize", prompt="a <|extra|>")["tokens"].index(2048)
    message = {"role": "user", "content": "a <|extra|>"}
    error = knowing.refuse(prompt="a <|extra|>")
    assert (place(error["message"]), error["param"]) == ((at, "prompt"), "prompt")
    assert place(knowing.refuse("", prompt="a <|extra|>")["message"]) == (at, "prompt")
    status, text = knowing.send("v1/chat/completions", {"messages": [message]})
    assert (status, json.loads(text)["error"]["param"]) == (400, "messages")
    for fields, found in (
        ({"prompt": [5, 2048]}, (1, "prompt")),
        ({"prompt": [[5], [2048]], "echo": True}, (0, "prompt")),
        ({"logit_bias": {"2048": 1}}, (0, "logit_bias")),
        ({"stop_token_ids": [2048], "min_tokens": 1}, (0, "stop_token_ids")),
    ):
        assert place(knowing.refuse(**fields)["message"]) == found
    tokens = knowing.ask("tokenize", prompt="<|extra|>")["tokens"]
    assert 2048 in tokens and knowing.ask("detokenize", tokens=tokens)["prompt"].endswith("<|extra|>")
    assert knowing.complete(max_tokens=1)["text"] and knowing.is_empty()


def test_end_tokens_that_the_model_has_not_are_none(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "demo_model"
    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 5000, -1]}')
    config = parse_config({"model_path": str(folder), "dtype": "float32"})
    service = GenerationService(folder, "demo", bench.service.engine, config)
    assert service._eos_ids == {0, 1}  # the second is the tokenizer's
    assert replace(bench, service=service).complete(min_tokens=2, max_tokens=3)["text"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-310},
        {"temperature": 1e-300, "top_p": 0.5, "seed": -1},
        {"temperature": 1.0, "repetition_penalty": 0.01},
        {"temperature": 1.0, "top_k": 2**70},
        {"temperature": 1.0, "logit_bias": {str(token_id): -100 for token_id in range(2048)}},
    ],
)
def test_engine_outlives_any_sampling(bench: Bench, fields: dict[str, Any]) -> None:
    bench.complete(max_tokens=3, **fields)
    assert bench.service.engine.is_alive


def test_prompts_that_are_alike_are_answered_each_by_chance(bench: Bench) -> None:
    texts = [choice["text"] for choice in bench.ask("v1/completions", prompt=[PROMPT] * 3, n=2, **HOT)["choices"]]
    assert len(set(texts)) == 6
    seeded = bench.ask("v1/completions", prompt=[PROMPT] * 2, n=2, seed=3, **HOT)["choices"]
    assert [choice["text"] for choice in seeded[:2]] == [choice["text"] for choice in seeded[2:]]


def test_echo_without_a_limit_has_as_many_tokens_as_without_echo(bench: Bench) -> None:
    ids = [7 + number % 900 for number in range(bench.service._max_model_len - 9)]
    fields = {"prompt": ids, "max_tokens": -1, "temperature": 0, "ignore_eos": True}
    usages = [bench.ask("v1/completions", **fields, echo=echo)["usage"]["completion_tokens"] for echo in (False, True)]
    assert usages == [9, 9]


def test_prompt_that_fills_the_model_may_be_echoed_and_scored(bench: Bench) -> None:
    length = bench.service._max_model_len
    ids = [7 + number % 900 for number in range(length)]
    choice = bench.complete(prompt=ids, echo=True, max_tokens=0, logprobs=0)
    assert len(choice["logprobs"]["tokens"]) == length and choice["finish_reason"] == "length"
    assert bench.refuse(prompt=[*ids, 7], echo=True, max_tokens=0)["param"] == "prompt"
    assert bench.refuse(prompt=ids, echo=True, max_tokens=1)["param"] == "prompt"
    assert bench.is_empty()


def test_what_nobody_foresaw_is_a_500_for_its_request_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(bench.service, "_tokens", fail)
        status, text = bench.send("v1/completions", {"prompt": PROMPT})
    assert (status, json.loads(text)["error"]["message"]) == (500, "TypeError: out of luck")
    assert "a request failed" in caplog.text
    assert bench.complete(max_tokens=1)["text"]


def test_health_is_that_of_the_engine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.send("health", {}) == (200, '{"status": "ok"}')
    monkeypatch.setattr(bench.service, "engine", SimpleNamespace(is_alive=False))
    assert bench.send("health", {}) == (503, '{"status": "failed"}')


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
    "required": ["ok", "tags"],
    "additionalProperties": False,
}
GRAMMARS = {
    "lark": 'start: "(" (start | "x")? ")"',
    "gbnf": 'root ::= "(" (root | "x")? ")"',
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
def test_answer_is_of_the_schema(bench: Bench, fields: dict[str, Any], temperature: float) -> None:
    choices = bench.ask(
        "v1/completions", prompt=PROMPT, temperature=temperature, max_tokens=200, n=3, seed=1, **fields
    )["choices"]
    for choice in choices:
        assert choice["finish_reason"] == "stop", choice
        value = json.loads(choice["text"])
        assert set(value) == {"ok", "tags"} and isinstance(value["ok"], bool) and set(value["tags"]) <= {"a", "b"}


def test_answer_is_a_json_object_when_no_more_is_asked(bench: Bench) -> None:
    fields = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0.0, "max_tokens": 60}
    fields |= {"response_format": {"type": "json_object"}, "logit_bias": {"94": 100}}  # "}", to come to an end
    text = bench.ask("v1/chat/completions", **fields)["choices"][0]["message"]["content"]
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "fields", [{"guided_regex": "[0-9]{3}-[a-c]+x"}, {"structured_outputs": {"regex": "[0-9]{3}-[a-c]+x"}}]
)
def test_answer_matches_the_expression(bench: Bench, fields: dict[str, Any]) -> None:
    for seed in range(3):
        choice = bench.complete(temperature=1.5, max_tokens=100, seed=seed, **fields)
        assert re.fullmatch("[0-9]{3}-[a-c]+x", choice["text"]), choice
        assert choice["finish_reason"] == "stop"


def test_answer_is_one_of_the_choices(bench: Bench) -> None:
    choices = ["yes", "yes, but", 'no "é"\n', "maybe"]
    texts = {bench.complete(temperature=3.0, seed=n, max_tokens=30, guided_choice=choices)["text"] for n in range(12)}
    assert texts <= set(choices) and len(texts) > 1
    assert bench.complete(max_tokens=30, structured_outputs={"choice": ["maybe"]})["text"] == "maybe"


@pytest.mark.parametrize("notation", GRAMMARS)
def test_answer_follows_the_grammar(bench: Bench, notation: str) -> None:
    for fields in ({"guided_grammar": GRAMMARS[notation]}, {"structured_outputs": {"grammar": GRAMMARS[notation]}}):
        choice = bench.complete(temperature=1.0, seed=2, max_tokens=200, **fields)
        assert re.fullmatch(r"(\()+x?(\))+", choice["text"]) and choice["text"].count("(") == choice["text"].count(")")


def test_structured_answer_that_is_cut_off_says_so_and_is_right_so_far(bench: Bench) -> None:
    choice = bench.complete(max_tokens=3, guided_regex="[0-9]{50}")
    assert choice["finish_reason"] == "length" and re.fullmatch("[0-9]{3,50}", choice["text"])


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"guided_regex": "[0-9"}, "guided_regex"),
        ({"guided_json": {"type": "objekt"}}, "guided_json"),
        ({"guided_json": "5"}, "guided_json"),
        ({"structured_outputs": {"json": {"$ref": "#/nowhere"}}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: nope"}}, "structured_outputs"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"guided_grammar": "start: /[^\\s\\S]/"}, "guided_grammar"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
        ),
    ],
)
def test_bad_form_is_a_400_for_this_request_alone(bench: Bench, fields: dict[str, Any], parameter: str) -> None:
    error = bench.refuse(**fields)
    assert error["param"] == parameter
    assert error["message"].startswith(f"{parameter}: ") and "\n" not in error["message"]
    assert bench.complete(max_tokens=1)["text"]


def test_form_that_becomes_too_complex_fails_its_request_alone(bench: Bench) -> None:
    before = bench.service.engine.figures().stats.num_ended["error"]
    status, text = bench.send(
        "v1/completions", {"prompt": PROMPT, "max_tokens": 50, "guided_grammar": 'start: "a" start'}
    )
    assert status == 400 and "Too many items" in json.loads(text)["error"]["message"]
    assert bench.service.engine.figures().stats.num_ended["error"] == before + 1
    assert bench.is_empty()
    assert bench.complete(max_tokens=1)["text"]


def test_request_that_takes_too_long_is_ended_and_its_blocks_are_free(bench: Bench) -> None:
    bench.runner.is_open.clear()
    threading.Timer(0.4, bench.runner.is_open.set).start()
    status, text = bench.send("v1/completions", {"prompt": PROMPT, "n": 2, "max_tokens": 400, "timeout": 0.2})
    error = json.loads(text)["error"]
    assert (status, error["type"]) == (504, "timeout_error")
    assert error["message"] == "the request took longer than its 0.2 s"
    assert bench.is_empty()


def test_stream_that_takes_too_long_ends_with_an_error(bench: Bench) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "stream": True, "timeout": 0.3}
    status, text = bench.send("v1/completions", fields)
    *chunks, error, done = events(text)
    assert status == 200 and chunks[0]["choices"][0]["text"]
    assert error["error"]["status"] == 504 and done == "[DONE]"
    assert bench.is_empty()


def test_configured_limit_holds_whatever_is_asked_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.service, "_max_seconds", 0.05)
    status, text = bench.send(
        "v1/completions", {"prompt": PROMPT, "max_tokens": 400, "timeout": 60, "ignore_eos": True}
    )
    assert (status, json.loads(text)["error"]["message"]) == (504, "the request took longer than its 0.05 s")
    assert math.isclose(bench.service._max_seconds or 0, 0.05)
    assert bench.is_empty()


@pytest.fixture
def spoil(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Has the model's logits of a request be NaN once its sequence is so long."""
    backend = bench.runner._runner._backend
    choose, spoilt = backend.choose, dict[str, int]()

    def choose_of_spoilt(logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
        for row, chunk in enumerate(chunk for chunk in chunks if chunk.is_sampled):
            if chunk.end >= spoilt.get(chunk.request_id, math.inf):
                logits[row, 7] = math.nan
        return list(choose(logits, chunks))

    monkeypatch.setattr(backend, "choose", choose_of_spoilt)
    return spoilt.__setitem__


def test_request_whose_logits_are_nan_is_a_500_that_says_so_and_others_are_answered(
    bench: Bench, spoil: Callable[[str, int], None]
) -> None:
    wanted = bench.complete(max_tokens=6)["text"]
    names = [f"nan{number}" for number in range(2)]
    spoil(names[0], 1)
    jobs = {
        name: bench.service.open_job(
            name,
            RawRequest("v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 6}, "application/json"),
        )
        for name in names
    }
    replies = {name: bench.read(name, job) for name, job in jobs.items()}
    status, text = replies[names[0]]
    error = json.loads(text)["error"]
    assert (status, error["status"], error["type"]) == (500, 500, "server_error")
    assert "NaN" in error["message"] and "\n" not in error["message"]
    status, text = replies[names[1]]
    assert (status, json.loads(text)["choices"][0]["text"]) == (200, wanted)
    assert bench.is_empty()


def test_stream_whose_logits_become_nan_ends_with_an_error_event(
    bench: Bench, spoil: Callable[[str, int], None]
) -> None:
    spoil("nan-stream", 12)
    body = {"prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "stream": True, "temperature": 0.8, "seed": 1}
    job = bench.service.open_job("nan-stream", RawRequest("v1/completions", body, "application/json"))
    status, text = bench.read("nan-stream", job)
    *chunks, error, done = events(text)
    assert status == 200 and chunks and all("error" not in chunk for chunk in chunks)
    assert error["error"]["status"] == 500 and "NaN" in error["error"]["message"] and done == "[DONE]"
    assert bench.is_empty()
    assert bench.complete(max_tokens=1)["text"]


def test_answer_of_which_every_token_is_forbidden_is_an_error(bench: Bench) -> None:
    bench.service.engine.submit(
        Request(
            "forbidden",
            (1, 2, 3),
            4,
            SamplingParams(logit_bias=tuple((token, -math.inf) for token in range(bench.runner._runner._vocabulary))),
        )
    )
    deadline = time.monotonic() + 30
    while not (delivery := bench.service.engine.router.take("forbidden")).is_last and time.monotonic() < deadline:
        bench.service.engine.router.wait(0.1)
    assert delivery.fault == "engine" and "no token may come next" in str(delivery.error)
    bench.service.engine.abort("forbidden")
    assert bench.is_empty()
