"""A real TorchServe with two ranks of the demo model, started as `ts-parallel serve` does, and real clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from deployment import wait_until
from grpc_client import predictions_request, send, stream_predictions
from http_client import events, get, post, stream
from places import DEMO_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

from ts_parallel.cli.server.archive import handler_config
from ts_parallel.cli.server.serve import running
from ts_parallel.cli.server.torchserve import TorchServe, free_ports
from ts_parallel.machine import this_machine

pytestmark = pytest.mark.torchserve

LONGEST = 256


@pytest.fixture(scope="module")
def server() -> Iterator[TorchServe]:
    """float32, so that answers can be compared token for token; shorter than the model allows, to meet the limit."""
    settings = {"dtype": "float32", "max_model_len": LONGEST, "kv_cache_memory": "64MiB"}
    config = handler_config(DEMO_MODEL, "cpu", tensor_parallel_size=2, **settings)
    port, metrics_port = free_ports(2)
    with running(config, DEMO_MODEL, "demo", "127.0.0.1", port, False, threading.Event(), metrics_port) as server:
        yield server


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)


def expected(plain: tuple[Any, Any], prompt: str, max_tokens: int, ignore_eos: bool = False) -> str:
    """transformers' own greedy answer."""
    model, tokenizer = plain
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ends = {"eos_token_id": None} if ignore_eos else {}
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens, pad_token_id=1, **ends)
    text: str = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


def completions(server: TorchServe) -> str:
    return f"{server.url}/1.0/v1/completions"


def test_nobody_listens_but_on_loopback(server: TorchServe) -> None:
    """Neither TorchServe, nor torchrun, nor its ranks, which torch lets listen on all addresses."""
    assert server.pid is not None
    family = [parent := psutil.Process(server.pid), *parent.children(recursive=True)]
    listening = [own.laddr for process in family for own in process.net_connections("inet") if own.status == "LISTEN"]
    assert len(listening) > 5  # Java's five, and gloo's
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_answer_streams_in_pieces_and_is_the_plain_models(server: TorchServe, plain: tuple[Any, Any]) -> None:
    body = {"prompt": "Return a list of", "max_tokens": 60}
    answers = [[piece for _, piece in stream(server.url, body)] for _ in range(4)]
    assert {"".join(pieces) for pieces in answers} == {expected(plain, "Return a list of", 60)}
    assert any(len(pieces) > 1 for pieces in answers)  # what waits where cores are short leaves at once


def test_raw_text_is_answered_with_text(server: TorchServe, plain: tuple[Any, Any]) -> None:
    status, text = post(server.url, b"Open the file", {"Content-Type": "text/plain"})
    room = LONGEST - len(plain[1]("Open the file").input_ids)
    assert (status, text) == (200, expected(plain, "Open the file", room))


def test_eight_prompts_at_once_each_get_their_own_answer(server: TorchServe, plain: tuple[Any, Any]) -> None:
    words = "Return the value of the first item in the list that was given to this function by its caller".split()
    prompts = [" ".join(words[: 2 * count + 1]) for count in range(8)]
    answers: dict[str, tuple[int, str]] = {}

    def ask(prompt: str) -> None:
        answers[prompt] = post(server.url, {"prompt": prompt, "max_tokens": 64, "stream": False})

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt in prompts:
        status, body = answers[prompt]
        assert status == 200
        assert json.loads(body)["text"] == expected(plain, prompt, 64)


def test_request_that_arrives_while_another_runs_answers_before_the_other_ends(server: TorchServe) -> None:
    ends: dict[str, float] = {}
    has_begun = threading.Event()

    def long_one() -> None:
        body = {"prompt": "The", "max_tokens": LONGEST - 8, "ignore_eos": True, "temperature": 0, "stream": True}
        for moment, _ in stream(completions(server), body):
            has_begun.set()
            ends["long"] = moment

    thread = threading.Thread(target=long_one)
    thread.start()
    assert has_begun.wait(30)
    moments = [moment for moment, _ in stream(server.url, {"prompt": "Open the", "max_tokens": 4})]
    thread.join()
    assert moments[0] < ends["long"]
    assert moments[-1] < ends["long"]


def test_stream_goes_on_while_a_large_text_is_tokenized(server: TorchServe) -> None:
    body = {"prompt": "The", "max_tokens": LONGEST - 8, "ignore_eos": True, "temperature": 0, "stream": True}
    answered: list[tuple[float, int]] = []

    def tokenize() -> None:
        status, _ = post(f"{server.url}/1.0/tokenize", {"prompt": "Return a new list, " * 100000})
        answered.append((time.perf_counter(), status))

    thread, moments = threading.Thread(target=tokenize), list[float]()
    for moment, _ in stream(completions(server), body):
        if not moments:
            thread.start()
        moments.append(moment)
    thread.join()
    ((end, status),) = answered
    assert status == 200
    assert len([moment for moment in moments[1:] if moment < end]) >= 3


def test_completion_over_openais_route(server: TorchServe, plain: tuple[Any, Any]) -> None:
    body = {"model": "demo", "prompt": "Return a list of", "max_tokens": 20, "temperature": 0}
    status, text = post(completions(server), body)
    answer = json.loads(text)
    assert status == 200
    assert answer["choices"][0]["text"] == expected(plain, "Return a list of", 20)
    assert answer["usage"]["prompt_tokens"] == len(plain[1]("Return a list of").input_ids)


def test_completion_stream_has_events_usage_and_an_end(server: TorchServe, plain: tuple[Any, Any]) -> None:
    ids = plain[1]("Return a list of").input_ids
    body = {
        "prompt": ids,
        "max_tokens": 20,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    *chunks, usage, done = events("".join(piece for _, piece in stream(completions(server), body)))
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == expected(plain, "Return a list of", 20, ignore_eos=True)
    assert usage["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 20, "total_tokens": len(ids) + 20}
    assert done == "[DONE]"


def test_seed_decides_a_sampled_answer(server: TorchServe) -> None:
    def sampled(seed: int) -> str:
        body = {"prompt": "This module", "max_tokens": 24, "temperature": 1.0, "seed": seed, "stream": False}
        text: str = json.loads(post(server.url, body)[1])["text"]
        return text

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_models_and_health_answer(server: TorchServe) -> None:
    status, text = get(f"{server.url}/1.0/v1/models")
    assert status == 200
    (model,) = json.loads(text)["data"]
    assert (model["id"], model["max_model_len"]) == ("demo", LONGEST)
    computed_by, machine = model["computed_by"], this_machine()
    assert (computed_by["processor"], computed_by["num_cores"]) == (machine.processor, machine.num_cores)
    assert computed_by["device"] == "cpu" and computed_by["backend"] in ("native", "torch")
    assert computed_by["dtype"] in ("float32", "bfloat16") and computed_by["instruction_set"]
    assert get(f"{server.url}/1.0/health") == (200, '{"status": "ok"}')


def test_unknown_route_is_404(server: TorchServe) -> None:
    status, text = post(f"{server.url}/1.0/v1/nothing", {})
    assert status == 404
    assert "v1/completions" in json.loads(text)["error"]["message"]


BAD_BODIES = [
    ({"prompt": "x", "max_tokens": "many"}, "max_tokens"),
    ({"prompt": "x", "max_tokenz": 5}, "max_tokens"),
    ({"prompt": ""}, "empty"),
    ({"prompt": "word " * 2 * LONGEST}, f"maximum context length is {LONGEST} tokens"),
    ({"prompt": "x", "max_tokens": LONGEST}, f"room for {LONGEST - 2}"),
    (b'{"prompt": "x", ', "not JSON"),
    (b"\xff\xff{", "body"),
]


@pytest.mark.parametrize("route", ["native", "openai"])
def test_bad_input_is_refused_alone(server: TorchServe, plain: tuple[Any, Any], route: str) -> None:
    """While a stream runs: each bad body gets a 400 that says why, and the stream goes on as if alone."""
    url = server.url if route == "native" else completions(server)
    pieces: list[str] = []
    has_begun = threading.Event()

    def neighbour() -> None:
        for _, piece in stream(server.url, {"prompt": "Return a new list", "max_tokens": 200}):
            pieces.append(piece)
            has_begun.set()

    thread = threading.Thread(target=neighbour)
    thread.start()
    assert has_begun.wait(30)
    for body, says in BAD_BODIES:
        status, text = post(url, body)
        assert status == 400, text
        assert says in json.loads(text)["error"]["message"]
    thread.join()
    assert "".join(pieces) == expected(plain, "Return a new list", 200)


def test_token_id_outside_the_vocabulary_is_refused(server: TorchServe) -> None:
    status, text = post(completions(server), {"prompt": [1, 999_999]})
    assert status == 400
    assert "999999" in json.loads(text)["error"]["message"]


def figure(text: str, name: str) -> float:
    """The value of a metric that has one series."""
    (value,) = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"{name}{{")]
    return float(value)


def own_figure(server: TorchServe, name: str) -> float:
    return figure(get(f"{server.url}/1.0/metrics")[1], f"vllm:{name}")


def test_worker_and_torchserve_show_the_same_figures(server: TorchServe) -> None:
    status, text = post(server.url, {"prompt": "Return a list of", "max_tokens": 9, "stream": False})
    usage = json.loads(text)["usage"]
    assert (status, usage["completion_tokens"]) == (200, 9)
    names = ["prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count"]
    own = [own_figure(server, name) for name in names]
    assert own[0] >= usage["prompt_tokens"] and own[1] >= 9 and own[2] >= 1
    assert own_figure(server, "inter_token_latency_seconds_sum") > 0

    def shown() -> list[float]:
        text = get(server.metrics_url)[1]
        return [figure(text, name) for name in names] if names[0] in text else []

    wait_until(lambda: shown() == own, lambda: f"{shown()}, not {own}", 20)
    assert 'time_to_first_token_seconds_bucket{model_name="demo"' in get(server.metrics_url)[1]


@pytest.mark.parametrize("is_alone", [True, False])
def test_client_that_leaves_gives_its_kv_blocks_back(server: TorchServe, is_alone: bool) -> None:
    """Alone, it is noticed when the next request comes, here the one that asks."""
    assert own_figure(server, "kv_cache_usage_perc") == 0
    num_aborted = own_aborts(server)
    body = {"prompt": "The", "max_tokens": LONGEST - 8, "ignore_eos": True, "stream": True}
    leaving = stream(completions(server), body)
    next(leaving)
    if is_alone:
        leaving.close()  # type: ignore[attr-defined]
    else:
        staying = stream(completions(server), body)
        next(staying)
        leaving.close()  # type: ignore[attr-defined]
        assert list(staying)[-1][1].endswith("[DONE]\n\n")
    wait_until(lambda: own_figure(server, "kv_cache_usage_perc") == 0, seconds=10)
    assert own_aborts(server) == num_aborted + 1
    assert own_figure(server, "num_requests_running") == 0


def own_aborts(server: TorchServe) -> float:
    lines = get(f"{server.url}/1.0/metrics")[1].splitlines()
    (line,) = [line for line in lines if 'finished_reason="abort"' in line]
    return float(line.rpartition(" ")[2])


def test_grpc_is_answered_like_http_though_in_one_piece(server: TorchServe, plain: tuple[Any, Any]) -> None:
    assert server.grpc_port is not None
    pieces = list(stream_predictions(server.grpc_port, "demo", {"prompt": "Return a list of", "max_tokens": 60}))
    assert pieces == [expected(plain, "Return a list of", 60)]
    body = {"prompt": "Return a list of", "max_tokens": 20, "temperature": 0, "stream": True}
    (text,) = stream_predictions(server.grpc_port, "demo", body, "v1/completions")
    *chunks, done = events(text)
    assert len(chunks) > 1 and done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected(plain, "Return a list of", 20)


@pytest.mark.parametrize("inputs", [{"data": b'{"prompt": "x", "max_tokenz": 5}'}, {}])
def test_bad_grpc_request_is_refused_alone(server: TorchServe, inputs: dict[str, bytes]) -> None:
    """TorchServe would end a worker whose answer did not say that it is the last."""
    assert server.grpc_port is not None
    (text,) = send(server.grpc_port, predictions_request("demo", inputs))
    assert json.loads(text)["error"]["status"] == 400
    assert get(f"{server.url}/1.0/health")[0] == 200
    assert server.log_text().count("ts_parallel is ready") == 1


def test_client_that_leaves_harms_nobody(server: TorchServe, plain: tuple[Any, Any]) -> None:
    body = {"prompt": "The", "max_tokens": LONGEST - 8, "ignore_eos": True, "stream": True}
    leaving = stream(completions(server), body)
    next(leaving)
    leaving.close()  # type: ignore[attr-defined]
    time.sleep(0.2)
    pieces = [piece for _, piece in stream(server.url, {"prompt": "Return a list of", "max_tokens": 30})]
    assert "".join(pieces) == expected(plain, "Return a list of", 30)
