"""What OpenAI's clients expect, through a real TorchServe: chat, stops, penalties, tokens, and a prompt asked twice."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from deployment import wait_until
from http_client import events, get, post
from places import DEMO_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

from ts_parallel.cli.server.archive import handler_config
from ts_parallel.cli.server.serve import running
from ts_parallel.cli.server.torchserve import TorchServe, free_ports

pytestmark = pytest.mark.torchserve

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'cat' %}{{ raise_exception('no cats') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}tools: {{ tools | length }}\n{% endif %}{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPT = "Return a new list containing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, with a chat template and with defaults of its own for sampling."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(DEMO_MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.7, "top_k": 1}))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TorchServe]:
    """Two stages: what sampling needs must reach the last."""
    config = handler_config(folder, "cpu", pipeline_parallel_size=2, dtype="float32", kv_cache_memory="64MiB")
    with running(config, folder, "demo", "127.0.0.1", free_ports(1)[0], False, threading.Event()) as server:
        yield server


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def expected(
    plain: tuple[Any, Any], prompt: str, max_tokens: int, *, add_special_tokens: bool = True, **options: Any
) -> str:
    """transformers' own greedy answer."""
    model, tokenizer = plain
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, add_special_tokens=add_special_tokens)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens, pad_token_id=1, **options)
    text: str = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.fixture(scope="module")
def client(server: TorchServe) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, which knows no more of the server than its address."""
    with openai.OpenAI(base_url=f"{server.url}/1.0/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(server: TorchServe, route: str, **fields: Any) -> dict[str, Any]:
    status, text = post(f"{server.url}/1.0/{route}", fields)
    assert status == 200, text
    answer: dict[str, Any] = json.loads(text)
    return answer


def complete(server: TorchServe, **fields: Any) -> dict[str, Any]:
    choice: dict[str, Any] = ask(server, "v1/completions", **{"prompt": PROMPT, "temperature": 0, **fields})["choices"][
        0
    ]
    return choice


def complete_ids(server: TorchServe, **fields: Any) -> list[int]:
    """The greedy answer as the tokens that its text has."""
    text = complete(server, **fields)["text"]
    ids: list[int] = ask(server, "tokenize", prompt=text, add_special_tokens=False)["tokens"]
    return ids


def test_chat_is_the_completion_of_its_template(server: TorchServe, plain: tuple[Any, Any]) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]
    answer = ask(server, "v1/chat/completions", messages=messages, temperature=0, max_tokens=20)
    prompt = "system: Be brief.\nuser: What is a list?\nassistant:"  # a template brings its own special tokens
    text = expected(plain, prompt, 20, add_special_tokens=False)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
    tools = [{"type": "function", "function": {"name": "f"}}]
    other = ask(server, "v1/chat/completions", messages=messages, tools=tools, temperature=0, max_tokens=20)
    assert other["usage"]["prompt_tokens"] > answer["usage"]["prompt_tokens"]


def test_chat_streams_deltas_and_says_first_who_speaks(server: TorchServe) -> None:
    fields = {"messages": [{"role": "user", "content": "What is a list?"}], "temperature": 0, "max_tokens": 12}
    whole = ask(server, "v1/chat/completions", **fields)["choices"][0]["message"]["content"]
    *chunks, done = events(post(f"{server.url}/1.0/v1/chat/completions", {**fields, "stream": True})[1])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert done == "[DONE]"
    assert [delta.get("role") for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(delta["content"] for delta in deltas) == whole


def test_messages_that_the_template_refuses_are_a_400(server: TorchServe) -> None:
    status, text = post(f"{server.url}/1.0/v1/chat/completions", {"messages": [{"role": "cat", "content": "x"}]})
    assert status == 400
    assert "no cats" in json.loads(text)["error"]["message"]


def test_answer_ends_before_a_stop_string(server: TorchServe, plain: tuple[Any, Any]) -> None:
    text = expected(plain, PROMPT, 40)
    stop = text[8:12]
    choice = complete(server, max_tokens=40, stop=[stop, "never to be seen"])
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "stop": stop, "stream": True}
    *chunks, _ = events(post(f"{server.url}/1.0/v1/completions", fields)[1])
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == choice["text"]
    included = complete(server, max_tokens=40, stop=stop, include_stop_str_in_output=True)
    assert included["text"] == choice["text"] + stop


def test_repetition_penalty_is_transformers_own(server: TorchServe, plain: tuple[Any, Any]) -> None:
    penalised = expected(plain, PROMPT, 30, repetition_penalty=1.3)
    assert complete(server, max_tokens=30, repetition_penalty=1.3)["text"] == penalised
    assert penalised != complete(server, max_tokens=30)["text"]


def test_bias_forbids_a_token(server: TorchServe) -> None:
    (first, *_) = complete_ids(server, max_tokens=1)
    assert complete_ids(server, max_tokens=1, logit_bias={str(first): -100})[0] != first


def test_stop_tokens_end_an_answer_but_not_before_min_tokens(server: TorchServe) -> None:
    ids = complete_ids(server, max_tokens=10)
    stop = next(token_id for token_id in ids[1:] if token_id != ids[0])
    answer = ask(server, "v1/completions", prompt=PROMPT, temperature=0, max_tokens=10, stop_token_ids=[stop])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == ids.index(stop) + 1
    fields = {"stop_token_ids": [stop], "min_tokens": 10, "max_tokens": 10}
    longer = ask(server, "v1/completions", prompt=PROMPT, temperature=0, **fields)
    assert longer["usage"]["completion_tokens"] == 10


def test_defaults_are_those_of_generation_config(server: TorchServe) -> None:
    texts = {
        ask(server, "v1/completions", prompt=PROMPT, max_tokens=12, seed=n)["choices"][0]["text"] for n in range(5)
    }
    assert texts == {complete(server, max_tokens=12)["text"]}  # top_k 1 leaves nothing to chance
    hot = {complete(server, max_tokens=12, seed=n, temperature=1.5, top_k=-1)["text"] for n in range(5)}
    assert len(hot) > 1


def test_tokens_go_there_and_back(server: TorchServe, plain: tuple[Any, Any]) -> None:
    tokens = ask(server, "tokenize", prompt=PROMPT)
    assert tokens["tokens"] == plain[1](PROMPT).input_ids
    assert tokens["count"] == len(tokens["tokens"])
    assert PROMPT in ask(server, "detokenize", tokens=tokens["tokens"])["prompt"]


def test_prompt_that_was_asked_before_is_reported_as_cached(server: TorchServe, plain: tuple[Any, Any]) -> None:
    prompt = PROMPT + " in which they were found there and then, one after the other, until there are none"
    answers = [ask(server, "v1/completions", prompt=prompt, temperature=0, max_tokens=20) for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["choices"][0]["text"] == expected(plain, prompt, 20)
    details = answers[1]["usage"]["prompt_tokens_details"]
    assert 16 <= details["cached_tokens"] < answers[1]["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("route", "fields", "parameter"),
    [
        ("v1/completions", {"prompt": "x", "logit_bias": {"99999999": 1}}, "logit_bias"),
        ("v1/completions", {"prompt": "x", "max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ("v1/chat/completions", {"messages": []}, "messages"),
        ("v1/chat/completions", {"message": []}, "message"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("tokenize", {}, "prompt"),
    ],
)
def test_bad_field_is_a_400_that_names_it(
    server: TorchServe, route: str, fields: dict[str, Any], parameter: str
) -> None:
    status, text = post(f"{server.url}/1.0/{route}", fields)
    assert (status, json.loads(text)["error"]["param"]) == (400, parameter)


MESSAGES: Any = [{"role": "user", "content": "What is a list?"}]


def test_sdk_lists_the_model_and_completes(client: openai.OpenAI, plain: tuple[Any, Any]) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo"
    answer = client.completions.create(model=model.id, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected(plain, PROMPT, 12)
    assert answer.usage is not None and answer.usage.completion_tokens == 12


def test_sdk_streams_what_it_gets_whole(client: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "temperature": 0, "max_tokens": 15}
    whole = client.completions.create(prompt=PROMPT, **fields).choices[0].text
    stream = client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **fields)
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert last.usage is not None and last.usage.completion_tokens == 15
    message = client.chat.completions.create(messages=MESSAGES, **fields).choices[0].message
    deltas = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(messages=MESSAGES, stream=True, **fields)
    ]
    assert message.role == deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == message.content


def test_sdk_reads_logprobs(client: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "temperature": 0, "max_tokens": 8}
    choice = client.completions.create(prompt=PROMPT, logprobs=2, **fields).choices[0]
    own = choice.logprobs
    assert own is not None and own.tokens and own.token_logprobs and own.top_logprobs
    assert "".join(own.tokens) == choice.text
    for token, logprob, best in zip(own.tokens, own.token_logprobs, own.top_logprobs, strict=True):
        assert logprob < 0 and best[token] == logprob == max(best.values()) and len(best) == 2
    chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **fields).choices[0]
    assert chat.logprobs is not None and chat.logprobs.content
    for entry in chat.logprobs.content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token
    streamed = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True, **fields)
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [entry for part in parts if part and part.content for entry in part.content] == chat.logprobs.content


def test_sdk_gets_n_choices_whole_and_streamed(client: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "n": 2, "temperature": 1.2, "seed": 3, "max_tokens": 12}
    fields["extra_body"] = {"top_k": -1}
    whole = client.chat.completions.create(messages=MESSAGES, **fields)
    texts = {choice.index: choice.message.content for choice in whole.choices}
    assert list(texts) == [0, 1] and texts[0] != texts[1]
    streamed = dict.fromkeys(texts, "")
    for chunk in client.chat.completions.create(messages=MESSAGES, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert len(client.completions.create(prompt=[PROMPT, "x"], **fields).choices) == 4


def test_sdk_gets_an_answer_of_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["list", "dict"]}, "size": {"type": "integer", "maximum": 99}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": schema}}
    for temperature in (0.0, 1.0):
        answer = client.chat.completions.create(
            model="demo", messages=MESSAGES, response_format=form, temperature=temperature, max_tokens=100
        ).choices[0]
        thing = json.loads(answer.message.content or "")
        assert answer.finish_reason == "stop"
        assert thing["name"] in ("list", "dict") and thing["size"] <= 99 and len(thing) == 2


def test_sdk_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="min_tokens is 9") as refusal:
        client.completions.create(model="demo", prompt="x", max_tokens=4, extra_body={"min_tokens": 9})
    assert (refusal.value.param, refusal.value.type) == ("min_tokens", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="Invalid type: objekt"):
        client.completions.create(model="demo", prompt="x", extra_body={"guided_json": {"type": "objekt"}})
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="demo", input="x", encoding_format="float")


def num_running(server: TorchServe) -> int:
    found = re.search(r"^\S*num_requests_running\S* (\S+)$", get(f"{server.url}/1.0/metrics")[1], re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def test_client_that_leaves_takes_all_its_choices_along(server: TorchServe, client: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(prompt=[PROMPT, "x"], n=2, stream=True, **fields)
    next(iter(stream))
    assert num_running(server) == 4
    stream.close()
    deadline = time.monotonic() + 20
    while num_running(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_request_that_takes_too_long_is_a_504_and_lets_go_of_everything(
    server: TorchServe, client: openai.OpenAI
) -> None:
    fields: Any = {
        "model": "demo",
        "prompt": PROMPT,
        "max_tokens": 480,
        "extra_body": {"ignore_eos": True, "timeout": 0.1},
    }
    with pytest.raises(openai.InternalServerError, match=r"longer than its 0\.1 s") as refusal:
        client.completions.create(**fields)
    assert refusal.value.status_code == 504
    with pytest.raises(openai.APIError, match=r"longer than its 0\.1 s"):
        for _ in client.completions.create(stream=True, **fields):
            pass
    assert num_running(server) == 0


def test_answer_that_a_stop_string_ends_is_counted_as_stopped(server: TorchServe) -> None:
    def num_stopped() -> float:
        lines = get(f"{server.url}/1.0/metrics")[1].splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if 'finished_reason="stop"' in line)

    before = num_stopped()
    text = complete(server, max_tokens=40, ignore_eos=True)["text"]
    assert num_stopped() == before
    assert complete(server, max_tokens=40, ignore_eos=True, stop=text[8:12])["finish_reason"] == "stop"
    deadline = time.monotonic() + 20  # the answer is complete a little before the engine lets go of its request
    while num_stopped() != before + 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_metrics_are_logged_where_no_port_shows_them(server: TorchServe) -> None:
    complete(server, max_tokens=3)
    file = server.log_folder / "model_metrics.log"
    wait_until(lambda: "generation_tokens_total.Count:" in file.read_text(), seconds=20)
    assert "time_to_first_token_seconds_sum.seconds:" in file.read_text()
