"""`serve --gateway-port` before a real TorchServe, asked by the clients that people have."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest
import requests
from deployment import wait_until
from gateway_process import gateway
from serve_process import Served, chat_folder, served_with_gateway

pytestmark = pytest.mark.torchserve

PROMPT = "Return a new list containing"
ASK: Any = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_with_gateway(chat_folder(tmp_path_factory.mktemp("gateway") / "model")) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.gateway}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.gateway, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def answer_of(served: Served, base: str, **fields: Any) -> str:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}
    text: str = httpx.post(f"{base}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    return text


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "demo" and model.model_extra is not None and model.model_extra["max_model_len"] == 512
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_completions_and_chats_are_the_models_own(client: openai.OpenAI, served: Served) -> None:
    expected = answer_of(served, served.direct)
    completion = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, temperature=0)
    assert completion.choices[0].text == expected == answer_of(served, served.gateway)
    pieces = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected
    whole = client.chat.completions.create(model="demo", messages=ASK, max_tokens=12, temperature=0)
    deltas = client.chat.completions.create(model="demo", messages=ASK, max_tokens=12, temperature=0, stream=True)
    said = whole.choices[0].message.content
    assert said and "".join(delta.choices[0].delta.content or "" for delta in deltas) == said


def test_responses_and_messages_say_what_the_chat_says(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    chat = client.chat.completions.create(model="demo", messages=ASK, max_tokens=12, temperature=0)
    said = chat.choices[0].message.content
    response: Any = client.responses.create(model="demo", input=PROMPT, max_output_tokens=12, temperature=0)
    assert response.output_text == said
    assert chat.usage is not None and response.usage.input_tokens == chat.usage.prompt_tokens
    events: Any = client.responses.create(model="demo", input=PROMPT, max_output_tokens=12, temperature=0, stream=True)
    assert "".join(own.delta for own in events if own.type == "response.output_text.delta") == said
    message: Any = claude.messages.create(model="demo", messages=ASK, max_tokens=12, extra_body={"temperature": 0})
    assert message.content[0].text == said and message.stop_reason == "max_tokens"
    with claude.messages.stream(model="demo", messages=ASK, max_tokens=12, extra_body={"temperature": 0}) as stream:
        assert "".join(stream.text_stream) == said
        usage = stream.get_final_message().usage
    assert usage.output_tokens == 12
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens


def test_messages_are_counted_as_the_model_reads_them(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    conversation: Any = [*ASK, {"role": "assistant", "content": "é 例"}, {"role": "user", "content": "b"}]
    counted = claude.messages.count_tokens(model="demo", messages=conversation, system="Be brief.")
    asked: Any = [{"role": "system", "content": "Be brief."}, *conversation]
    chat = client.chat.completions.create(model="demo", messages=asked, max_tokens=1)
    assert chat.usage is not None and counted.input_tokens == chat.usage.prompt_tokens
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        claude.messages.count_tokens(model="demo", messages=[])


def test_response_goes_on_from_the_one_before(client: openai.OpenAI) -> None:
    first = client.responses.create(model="demo", input="a", max_output_tokens=4, temperature=0)
    second: Any = client.responses.create(model="demo", input="b", previous_response_id=first.id, max_output_tokens=4)
    conversation: Any = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "b"},
    ]
    chat = client.chat.completions.create(model="demo", messages=conversation, max_tokens=4)
    assert chat.usage is not None and second.usage.input_tokens == chat.usage.prompt_tokens


def test_refusals_of_the_model_are_its_own_words(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="demo", prompt="a", temperature=1000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.responses.create(model="demo", input="a", temperature=1000, stream=True)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        claude.messages.create(model="demo", messages=ASK, max_tokens=4, extra_body={"temperature": 1000})


def test_tokens_and_back(served: Served) -> None:
    tokens = requests.post(f"{served.gateway}/tokenize", json={"prompt": PROMPT}, timeout=60).json()["tokens"]
    text = requests.post(f"{served.gateway}/detokenize", json={"tokens": tokens}, timeout=60).json()["prompt"]
    assert PROMPT in text


@pytest.mark.parametrize("word", ["é 例 ✅", "a b c"])
def test_plain_readers_of_lines_read_every_event(served: Served, word: str) -> None:
    body = {"messages": ASK, "stream": True, "guided_choice": [word]}
    with requests.post(f"{served.gateway}/v1/chat/completions", json=body, stream=True, timeout=60) as answer:
        lines = [line for line in answer.iter_lines(decode_unicode=True) if line]
    assert lines[-1] == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == word


def test_many_streams_at_once_get_each_its_own(served: Served) -> None:
    prompts = [f"{PROMPT} {number}" for number in range(24)]
    alone = [answer_of(served, served.direct, prompt=prompt) for prompt in prompts]

    def ask(prompt: str) -> str:
        with openai.OpenAI(base_url=f"{served.gateway}/v1", api_key="none", timeout=120) as own:
            pieces = own.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0, stream=True)
            return "".join(piece.choices[0].text for piece in pieces)

    with ThreadPoolExecutor(24) as threads:
        assert list(threads.map(ask, prompts)) == alone


def figure(text: str, name: str) -> float:
    (found,) = re.findall(rf"^{re.escape(name)}(?:{{.*}})? ([\d.e+]+)$", text, re.MULTILINE)
    return float(found)


def test_metrics_have_the_models_figures_and_the_gateways(served: Served) -> None:
    text = httpx.get(f"{served.gateway}/metrics").text
    assert figure(text, "vllm:generation_tokens_total") > 0
    assert figure(text, "vllm:cache_config_info") == 1
    (labels,) = re.findall(r"^vllm:cache_config_info{(.*)}", text, re.MULTILINE)
    assert 'block_size="' in labels and int(re.findall(r'num_gpu_blocks="(\d+)"', labels)[0]) > 1
    assert text.count("# TYPE vllm:generation_tokens_total ") == 1
    assert figure(text, "ts_parallel_gateway_requests_open") == 1  # this one


def own_figure(served: Served, name: str) -> float:
    text = httpx.get(f"{served.direct}/metrics").text
    (found,) = re.findall(rf"^vllm:{name}.*}} ([\d.]+)$", text, re.MULTILINE)
    return float(found)


def aborted(served: Served) -> float:
    return own_figure(served, 'request_success_total{.*finished_reason="abort"')


def test_client_that_leaves_ends_its_request_in_the_engine(served: Served) -> None:
    before = aborted(served)
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.gateway}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_raw())
    wait_until(lambda: aborted(served) == before + 1, seconds=30)
    assert own_figure(served, "kv_cache_usage_perc") == 0


LONG = {"ignore_eos": True, "temperature": 0}
WHOLE: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 480, "n": 8, **LONG},
    "/v1/chat/completions": {"messages": ASK, "max_tokens": 450, "n": 8, **LONG},
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 450, **LONG},
    "/v1/messages": {"messages": ASK, "max_tokens": 450, **LONG},
}


@pytest.mark.parametrize("route", WHOLE)
def test_client_that_leaves_a_whole_answer_ends_its_request_in_the_engine(served: Served, route: str) -> None:
    """Others are answered meanwhile, so slowly that it is at work when its client leaves, and are whole."""
    before, others = aborted(served), threading.Event()
    body = {"prompt": "a", "max_tokens": 480, "n": 16, "ignore_eos": True, "temperature": 1, "logprobs": 5}

    def ask_on() -> list[int]:
        statuses = []
        while not others.is_set():
            statuses.append(httpx.post(f"{served.gateway}/v1/completions", json=body, timeout=120).status_code)
        return statuses

    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask_on)
        wait_until(lambda: own_figure(served, "num_requests_running") >= 16)
        try:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{served.gateway}{route}", json={"model": "demo", **WHOLE[route]}, timeout=0.3)
            wait_until(lambda: aborted(served) > before, seconds=30)
        finally:
            others.set()
        assert set(asking.result()) == {200}
    assert aborted(served) == before + WHOLE[route].get("n", 1)
    wait_until(lambda: own_figure(served, "kv_cache_usage_perc") == 0)


def test_whole_answer_that_takes_long_is_what_it_is_without_the_gateway(served: Served) -> None:
    """It begins before its end is known, so an error's status comes another way."""
    body = {"prompt": PROMPT, "max_tokens": 480, "n": 32, "ignore_eos": True, "temperature": 0, "logprobs": 5}
    direct, passed = (
        httpx.post(f"{own}/v1/completions", json=body, timeout=120) for own in (served.direct, served.gateway)
    )
    assert direct.status_code == passed.status_code == 200
    assert direct.json()["choices"] == passed.json()["choices"] and direct.json()["usage"] == passed.json()["usage"]
    cut = {**body, "timeout": 0.8}
    direct, passed = (
        httpx.post(f"{own}/v1/completions", json=cut, timeout=120) for own in (served.direct, served.gateway)
    )
    assert direct.status_code == passed.status_code == 504
    assert direct.json()["error"] == passed.json()["error"]


def gateway_of(served: Served) -> psutil.Process:
    (found,) = served.family("--upstream")
    return found


def test_gateway_knows_no_torch(served: Served) -> None:
    maps = Path(f"/proc/{gateway_of(served).pid}/maps").read_text()
    assert "python" in maps and "torch" not in maps and "numpy" not in maps


def test_gateway_that_is_killed_is_started_again(served: Served, client: openai.OpenAI) -> None:
    before = gateway_of(served)
    before.send_signal(signal.SIGKILL)

    def answers() -> bool:
        try:
            return httpx.get(f"{served.gateway}/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers, seconds=60)
    assert gateway_of(served).pid != before.pid
    assert client.completions.create(model="demo", prompt="a", max_tokens=2).choices


def test_one_gateway_serves_two_models_by_name(served: Served) -> None:
    base = served.direct.removesuffix("/1.0")
    with gateway(f"one={base}", f"two={base}/1.0") as front:
        with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            assert [model.id for model in client.models.list()] == ["one", "two"]
            for name in ("one", "two"):
                completion = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0)
                assert completion.choices[0].text == answer_of(served, served.direct)
            with pytest.raises(openai.NotFoundError, match="one, two"):
                client.completions.create(model="demo", prompt=PROMPT)
        text = httpx.get(f"{front.url}/metrics").text
        assert text.count("# TYPE vllm:generation_tokens_total ") == 1
