"""What clients of many kinds send and expect, through a real TorchServe that asks for a key and lets pages ask."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest
import requests
from bodies_at_limits import REACHING
from deployment import wait_until
from http_client import events
from places import DEMO_MODEL

from ts_parallel.cli.server.archive import handler_config
from ts_parallel.cli.server.serve import running
from ts_parallel.cli.server.torchserve import Access, TorchServe, free_ports

pytestmark = pytest.mark.torchserve

KEY, ORIGIN = "sk-very-secret-7", "https://chat.example"
TEMPLATE = (
    "{% if reasoning_effort %}<effort {{ reasoning_effort }}>{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% for call in m.tool_calls %}<call {{ call.function.name }}"
    "{% for key, value in call.function.arguments|items %} {{ key }}={{ value }}{% endfor %}>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT = "Return a new list containing"
MESSAGES: Any = [{"role": "user", "content": "What is a list?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    folder = tmp_path_factory.mktemp("habits") / "model"
    shutil.copytree(DEMO_MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = handler_config(
        folder, "cpu", dtype="float32", kv_cache_memory="64MiB", served_model_name="gpt-4o,demo", max_num_waiting=0
    )
    options: Any = {"access": Access(f"other,{KEY}", ORIGIN), "max_request_size": 1 << 20, "max_response_size": 1 << 17}
    with running(config, folder, "demo", "127.0.0.1", free_ports(1)[0], False, threading.Event(), **options) as own:
        yield own


@pytest.fixture(scope="module")
def client(server: TorchServe) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/1.0/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def web(server: TorchServe) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"{server.url}/1.0/", headers=headers, timeout=60) as web:
        yield web


def complete(web: httpx.Client, **fields: Any) -> Any:
    response = web.post("v1/completions", json={"prompt": PROMPT, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def chat_ids(web: httpx.Client, **fields: Any) -> list[int]:
    response = web.post("tokenize", json={"messages": MESSAGES, **fields})
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["tokens"]
    return ids


def chat_text(web: httpx.Client, **fields: Any) -> str:
    text: str = web.post("detokenize", json={"tokens": chat_ids(web, **fields)}).json()["prompt"]
    return text


def test_wrong_key_raises_the_sdks_own_error_and_no_key_too(server: TorchServe) -> None:
    for key in ("wrong", "other,", KEY[:-1]):
        with openai.OpenAI(base_url=f"{server.url}/1.0/v1", api_key=key, max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refusal:
                client.models.list()
        assert (refusal.value.status_code, refusal.value.code) == (401, "invalid_api_key")
        assert key not in refusal.value.message
    for method, url in (
        ("POST", server.url),
        ("GET", f"{server.url}/1.0/metrics"),
        ("POST", f"{server.url}/1.0/tokenize"),
    ):
        response = httpx.request(method, url, json={"prompt": "x"} if method == "POST" else None)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.url}/1.0/health").status_code == 200
    assert httpx.post(server.url, json={"prompt": PROMPT}, headers={"api-key": "other"}).status_code == 200


def test_key_stands_on_no_command_line_and_in_no_file_or_log(server: TorchServe) -> None:
    assert server.pid is not None
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    assert len(family) > 2
    assert not any(KEY in part for process in family for part in process.cmdline())
    files = [file for file in server.log_folder.parent.rglob("*") if file.is_file()]
    assert files and not any(KEY.encode() in file.read_bytes() for file in files)


def test_model_is_found_by_its_names_and_another_is_a_404(client: openai.OpenAI, web: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == ["gpt-4o", "demo"]
    assert client.models.retrieve("demo").id == "demo"
    for name in ("gpt-4o", "demo", "model", ""):
        assert client.completions.create(model=name, prompt="x", max_tokens=1).model == "gpt-4o"
    for ask in (
        lambda: client.models.retrieve("nope"),
        lambda: client.chat.completions.create(model="nope", messages=MESSAGES, max_tokens=1),
        lambda: client.completions.create(model="nope", prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError, match="does not exist") as refusal:
            ask()
        assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
    assert web.get("v1/nothing").json()["error"]["code"] == "unknown_url"


def test_what_is_too_long_has_openais_code(client: openai.OpenAI) -> None:
    for fields in ({"max_tokens": 4096}, {"max_tokens": 1, "messages": [{"role": "user", "content": "word " * 600}]}):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as refusal:
            client.chat.completions.create(model="demo", **{"messages": MESSAGES, **fields})  # type: ignore[call-overload]
        assert refusal.value.code == "context_length_exceeded"


def test_letters_of_a_stream_are_read_right_by_every_reader(web: httpx.Client, server: TorchServe) -> None:
    text = "a\u2028b\u0085é 例 ✅"
    body = {"messages": MESSAGES, "guided_choice": [text], "stream": True, "max_tokens": 64}
    url, headers = f"{server.url}/1.0/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    with requests.post(url, json=body, headers=headers, stream=True, timeout=60) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        by_requests = "\n".join(response.iter_lines(decode_unicode=True))
    with web.stream("POST", "v1/chat/completions", json=body) as streamed:
        by_httpx = "\n".join(streamed.iter_lines())
    for lines in (by_requests, by_httpx):
        *chunks, done = events(lines)
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text and done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_clients_own_id_comes_back(web: httpx.Client, stream: bool) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2, "stream": stream}
    response = web.post("v1/chat/completions", json=body, headers={"X-Request-Id": "abc-1"})
    assert response.headers["x-client-request-id"] == "abc-1" and response.headers["x-request-id"]
    answer = events(response.text)[0] if stream else response.json()
    assert answer["id"] == "chatcmpl-abc-1"
    refused = web.post("v1/chat/completions", json={}, headers={"X-Request-Id": "abc-2"})
    assert (refused.status_code, refused.headers["x-client-request-id"]) == (400, "abc-2")
    odd = web.post("v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": 'a" b'})
    assert "x-client-request-id" not in odd.headers and '"' not in odd.json()["id"]


@pytest.mark.parametrize("stream", [False, True])
def test_page_of_the_origin_may_ask(server: TorchServe, web: httpx.Client, stream: bool) -> None:
    wanted = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    wanted["Access-Control-Request-Headers"] = "authorization, content-type, x-stainless-lang"
    before = httpx.request("OPTIONS", f"{server.url}/1.0/v1/chat/completions", headers=wanted)
    assert before.status_code == 200 and before.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in before.headers["access-control-allow-methods"]
    allowed = before.headers["access-control-allow-headers"].lower()
    assert all(name in allowed for name in ("authorization", "content-type", "x-stainless-lang"))
    body = {"prompt": "x", "max_tokens": 1, "stream": stream}
    for answer in (web.post("v1/completions", json=body), web.post("v1/completions", json={})):
        assert answer.headers["access-control-allow-origin"] == ORIGIN


def test_full_server_says_when_to_try_again(web: httpx.Client) -> None:
    fields = {"prompt": ["x"] * 32, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with web.stream("POST", "v1/completions", json=fields) as streamed:
        lines = streamed.iter_lines()  # which is to live on: its end is that of the stream
        next(lines)
        refused = web.post("v1/completions", json={"prompt": "x"})
    assert (refused.status_code, refused.headers.get("retry-after")) == (429, "1"), refused.text
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    wait_until(lambda: web.post("v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200)


def test_conversation_is_tokenized_as_it_is_asked(web: httpx.Client, client: openai.OpenAI) -> None:
    usage = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=1).usage
    assert usage is not None and usage.prompt_tokens == len(chat_ids(web))
    assert "<assistant>" in chat_text(web) and "<assistant>" not in chat_text(web, add_generation_prompt=False)
    prefilled = [*MESSAGES, {"role": "assistant", "content": "Sure, "}]
    assert chat_text(web, messages=prefilled, continue_final_message=True).endswith("<assistant>Sure, ")
    assert "<effort high>" in chat_text(web, reasoning_effort="high")
    answer = web.post("tokenize", json={"prompt": "a b", "return_token_strs": True}).json()
    assert len(answer["token_strs"]) == answer["count"]


def test_history_of_a_tool_loop_is_in_the_prompt(web: httpx.Client) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "mul", "arguments": '{"a":3}'}}
    said = {"role": "assistant", "content": None, "refusal": None, "function_call": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "twelve"}]}
    text = chat_text(web, messages=[*MESSAGES, said, result])
    assert "<call mul a=3>" in text and "<tool>twelve" in text
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    refused = web.post("v1/chat/completions", json={"messages": [image]})
    assert refused.status_code == 400 and "image_url" in refused.json()["error"]["message"]


def test_prompt_gets_the_tokenizers_own_tokens_or_not_and_its_end_alone_may_count(web: httpx.Client) -> None:
    ids = web.post("tokenize", json={"prompt": PROMPT}).json()["tokens"]
    whole = complete(web, max_tokens=4, echo=True)
    assert whole["usage"]["prompt_tokens"] == len(ids) and whole["choices"][0]["text"].startswith(PROMPT)
    cut = complete(web, max_tokens=4, truncate_prompt_tokens=2, echo=True)
    end = web.post("detokenize", json={"tokens": ids[-2:]}).json()["prompt"]
    assert cut["usage"]["prompt_tokens"] == 2 and cut["choices"][0]["text"].startswith(end)
    assert cut["choices"][0]["text"][len(end) :] == complete(web, prompt=ids[-2:], max_tokens=4)["choices"][0]["text"]


def test_special_tokens_show_where_they_are_wanted(web: httpx.Client, client: openai.OpenAI) -> None:
    eos = json.loads((DEMO_MODEL / "config.json").read_text())["eos_token_id"]
    forced = {"logit_bias": {str(eos): 100}, "ignore_eos": True, "max_tokens": 2}
    assert complete(web, **forced)["choices"][0]["text"] == ""
    shown = complete(web, **forced, skip_special_tokens=False)["choices"][0]["text"]
    assert (
        shown
        and web.post("tokenize", json={"prompt": shown, "add_special_tokens": False}).json()["tokens"] == [eos] * 2
    )


def test_only_allowed_tokens_come_and_no_bad_words(web: httpx.Client) -> None:
    plain = complete(web, max_tokens=12, logprobs=0)["choices"][0]
    words = [token for token in plain["logprobs"]["tokens"] if token.strip()]
    other = complete(web, max_tokens=12, logprobs=0, bad_words=[words[0].strip()])["choices"][0]
    assert words[0] not in other["logprobs"]["tokens"]
    ids = web.post("tokenize", json={"prompt": "a b c", "add_special_tokens": False}).json()["tokens"]
    text = complete(web, max_tokens=12, allowed_token_ids=ids, temperature=1.0)["choices"][0]["text"]
    assert text and set(text) <= set("a b c")


def test_greedy_by_any_name_is_greedy(web: httpx.Client) -> None:
    greedy = complete(web, max_tokens=12)["choices"][0]["text"]
    for fields in ({"top_p": 0}, {"do_sample": False}, {"temperature": 0.0, "max_tokens": 12.0, "n": 1.0}):
        assert complete(web, **{"temperature": 1.3, "max_tokens": 12, **fields})["choices"][0]["text"] == greedy


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_prompt_and_answer_are_told_by_their_numbers(web: httpx.Client, stream: bool) -> None:
    fields = {"prompt": [PROMPT, "x y"], "temperature": 0, "max_tokens": 9, "return_token_ids": True, "stream": stream}
    response = web.post("v1/completions", json={**fields, "n": 2, "stop": ["qqq"]})
    said = events(response.text)[:-1] if stream else [response.json()]
    choices = [choice for own in said for choice in own["choices"]]
    plain = complete(web, prompt=[PROMPT, "x y"], max_tokens=9)["choices"]
    for index in range(4):
        own = [choice for choice in choices if choice["index"] == index]
        ids = [token_id for choice in own for token_id in choice["token_ids"]]
        assert len(ids) == 9
        text = "".join(choice["text"] for choice in own)
        assert text == plain[index // 2]["text"]
        prompt = web.post("tokenize", json={"prompt": fields["prompt"][index // 2]}).json()["tokens"]  # type: ignore[index]
        assert [choice.get("prompt_token_ids") for choice in own] == [prompt] + [None] * (len(own) - 1)
        assert web.post("detokenize", json={"tokens": prompt + ids}).json()["prompt"].endswith(text)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_a_chat_are_told_where_vllm_has_them(web: httpx.Client, stream: bool) -> None:
    fields = {"messages": MESSAGES, "max_tokens": 4, "n": 2, "return_token_ids": True, "stream": stream}
    response = web.post("v1/chat/completions", json={**fields, "ignore_eos": True})
    first, *others = events(response.text)[:-1] if stream else [response.json()]
    assert first["prompt_token_ids"] == chat_ids(web)
    assert not any("prompt_token_ids" in own for own in others)
    choices = [choice for own in (first, *others) for choice in own["choices"]]
    assert [sum(len(own["token_ids"]) for own in choices if own["index"] == index) for index in range(2)] == [4, 4]


def test_prompt_is_scored_as_an_echo_is(web: httpx.Client) -> None:
    echoed = complete(web, echo=True, logprobs=3, max_tokens=1)["choices"][0]["logprobs"]
    own = complete(web, prompt_logprobs=3, max_tokens=1)["choices"][0]
    ids = web.post("tokenize", json={"prompt": PROMPT}).json()["tokens"]
    first, *scores = own["prompt_logprobs"]
    assert own["logprobs"] is None and first is None and len(scores) == len(ids) - 1
    for at, (token_id, entry) in enumerate(zip(ids[1:], scores, strict=True), start=1):
        assert entry[str(token_id)]["logprob"] == pytest.approx(echoed["token_logprobs"][at], abs=1e-4)
        assert entry[str(token_id)]["decoded_token"] == echoed["tokens"][at]
        assert sorted(score["rank"] for score in entry.values() if score["rank"]) == [1, 2, 3]
    both = complete(web, prompt_logprobs=5, logprobs=1, max_tokens=2)["choices"][0]
    assert all(len(best) == 1 for best in both["logprobs"]["top_logprobs"])
    assert all(len(entry) in (5, 6) for entry in both["prompt_logprobs"][1:])


def test_native_answer_has_tokens_too_but_its_stream_of_text_cannot(server: TorchServe, web: httpx.Client) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 3, "return_token_ids": True, "prompt_logprobs": 0}
    answer = web.post(server.url, json={**fields, "stream": False}).json()
    assert len(answer["token_ids"]) == 3 and len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])
    refused = web.post(server.url, json=fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "return_token_ids")


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json; charset=utf-8", b'{"prompt": "x", "max_tokens": 1}', 200),
        ("application/json", b'\xef\xbb\xbf{"prompt": "x", "max_tokens": 1}', 200),
        ("application/json", '{"prompt": "x", "max_tokens": 1}'.encode("utf-16"), 200),
        (None, b'{"prompt": "x", "max_tokens": 1}', 200),
        ("application/json", b'{"prompt": "del sue\xf1o"}', 400),
        ("application/json", b'{"prompt": ', 400),
        ("application/x-www-form-urlencoded", b"prompt=x", 400),
    ],
)
@pytest.mark.parametrize("end", ["", "/", "?api-version=2024-10-21"])
def test_body_is_read_however_it_is_sent(
    server: TorchServe, content_type: str | None, body: bytes, status: int, end: str
) -> None:
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    headers = {"Authorization": f"Bearer {KEY}", **({"Content-Type": content_type} if content_type else {})}
    connection.request("POST", f"{parts.path}/1.0/v1/completions{end}", body, headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    assert response.status == status, text
    assert ("choices" if status == 200 else "error") in json.loads(text)


# One request that no server of this size could ever take is its own client's mistake.
ALONE = {"open_requests": 400}


def test_every_limit_is_kept_to_the_last_one_and_answered_beyond(web: httpx.Client) -> None:
    limits = web.get("v1/limits").json()["limits"]
    assert {name for name, limit in limits.items() if limit["most"] is not None} == REACHING.keys()
    assert limits["max_request_size"]["most"] == 1 << 20 and limits["max_model_len"]["most"] == 512
    for name, limit in limits.items():
        for beyond in (-1, 0, 1) if limit["most"] is not None else ():
            route, body = REACHING[name](limit["most"] + beyond)
            response = web.post(route, content=json.dumps(body), headers={"Content-Type": "application/json"})
            expected = ALONE.get(name, limit["status_beyond"]) if beyond > 0 else 200
            assert response.status_code == expected, (name, beyond, response.text[:500])
            if beyond > 0 and name != "max_request_size":  # to which TorchServe answers with nothing else
                assert response.json()["error"]["status"] == expected
            elif beyond == 0 and name == "max_response_size":
                assert len(response.content) == limit["most"]
    assert complete(web, max_tokens=1)["choices"]
