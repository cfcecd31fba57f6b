"""Tool calls and reasoning as OpenAI's own client reads them, through a real TorchServe, whole and streamed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from chat_tokenizers import EOS, chat_tokenizer
from http_client import post
from small_service import checkpoint_with

from ts_parallel.cli.server.archive import handler_config
from ts_parallel.cli.server.serve import running
from ts_parallel.cli.server.torchserve import TorchServe, free_ports

pytestmark = pytest.mark.torchserve

MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>")
TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool.function.name }}\n{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "|{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if thinks %}<think>\n{% endif %}{% endif %}"
)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
# Of a schema that nothing can be held to.
UNKNOWN: Any = {
    "type": "function",
    "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string", "pattern": "(?=b)c"}}}},
}
TOOLS: Any = [WEATHER, NOW]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
ASKED: Any = [{"role": "user", "content": "How is the weather?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
CALL_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer(added=MARKERS, template=TEMPLATE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[TorchServe]:
    eos = {"eos_token_id": tokenizer.eos_token_id}
    folder = tmp_path_factory.mktemp("tools") / "model"
    checkpoint_with(folder, tokenizer, config=eos, generation_config=eos)
    config = handler_config(folder, "cpu", dtype="float32", kv_cache_memory="64MiB")
    with running(config, folder, "demo", "127.0.0.1", free_ports(1)[0], False, threading.Event()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: TorchServe) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/1.0/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


class Asker:
    """Asks twice, whole and streamed, and sees to it that both say the same."""

    def __init__(self, client: openai.OpenAI, tokenizer: Any) -> None:
        self._client = client
        # An answer ends as soon as it may, and a call comes before any thought, which could go on for ever.
        self._short = {str(tokenizer.convert_tokens_to_ids(own)): 100 for own in (EOS, "<tool_call>")}

    def ask(self, *, says: str | None = None, **fields: Any) -> Any:
        """The choices of a whole answer.

        Args:
            says: the text that the model is made to write.
        """
        own = {"model": "demo", "messages": ASKED, "temperature": 0, "logit_bias": self._short, "max_tokens": 240}
        own |= fields
        if says is not None:
            own["extra_body"] = {**own.get("extra_body", {}), "guided_choice": [says]}
        whole = self._client.chat.completions.create(**own)
        streamed = self._joined(own, len(whole.choices))
        for choice, (message, reason) in zip(whole.choices, streamed, strict=True):
            expected = choice.message.model_dump(exclude_none=True)
            for call in [*expected.get("tool_calls", []), *message.get("tool_calls", [])]:
                assert call.pop("id").startswith("call_")
            assert (message, reason) == (expected, choice.finish_reason)
        return whole.choices

    def _joined(self, fields: dict[str, Any], num_choices: int) -> list[tuple[dict[str, Any], str | None]]:
        messages: list[dict[str, Any]] = [{} for _ in range(num_choices)]
        reasons: list[str | None] = [None] * num_choices
        for chunk in self._client.chat.completions.create(**fields, stream=True):
            (choice,) = chunk.choices
            message, delta = messages[choice.index], choice.delta.model_dump(exclude_none=True)
            assert reasons[choice.index] is None
            assert ("role" in delta) == (not message)  # once, at first
            for call in delta.pop("tool_calls", []):
                calls = message.setdefault("tool_calls", [])
                if "id" in call:
                    assert call["index"] == len(calls)
                    assert call["type"] == "function" and call["function"]["arguments"] == ""
                    calls.append({key: value for key, value in call.items() if key != "index"})
                else:
                    assert call.keys() == {"index", "function"} and call["index"] == len(calls) - 1
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
            for key, value in delta.items():
                message[key] = message.get(key, "") + value
            reasons[choice.index] = choice.finish_reason
        for message in messages:
            if "tool_calls" not in message:
                message.setdefault("content", "")
        return list(zip(messages, reasons, strict=True))


@pytest.fixture(scope="module")
def asker(client: openai.OpenAI, tokenizer: Any) -> Asker:
    return Asker(client, tokenizer)


def calls_of(choice: Any) -> list[tuple[str, Any]]:
    calls = choice.message.tool_calls or []
    assert len({own.id for own in calls}) == len(calls)
    return [(own.function.name, json.loads(own.function.arguments)) for own in calls]


def test_required_makes_a_call_whatever_the_model_would_say(asker: Asker) -> None:
    (choice,) = asker.ask(tools=TOOLS, tool_choice="required")
    ((name, arguments),) = calls_of(choice)
    assert name == "now" or (arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 9)
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)


def test_named_function_is_the_one_that_is_called(asker: Asker) -> None:
    for name in ("get_weather", "now"):
        (choice,) = asker.ask(tools=TOOLS, tool_choice={"type": "function", "function": {"name": name}})
        assert [own for own, _ in calls_of(choice)] == [name]
        assert choice.finish_reason == "tool_calls"


def test_allowed_tools_are_the_ones_that_are_called(asker: Asker) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    (choice,) = asker.ask(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert calls_of(choice) == [("now", {})]


def test_auto_reads_what_the_model_writes(asker: Asker) -> None:
    (choice,) = asker.ask(tools=TOOLS, says=f"<think>\nLet me\nsee.\n</think>\n\nI look.\n{CALL}\n{CALL_NOW}")
    assert calls_of(choice) == [("get_weather", {"city": "Paris", "days": 2}), ("now", {})]
    assert (choice.message.content, choice.message.reasoning_content) == ("I look.", "Let me\nsee.")
    assert choice.finish_reason == "tool_calls"
    (choice,) = asker.ask(tools=TOOLS, tool_choice="auto", says="No tool is needed.")
    assert (choice.message.content, choice.message.tool_calls) == ("No tool is needed.", None)
    assert choice.finish_reason == "stop"


def test_what_is_no_call_is_content(asker: Asker) -> None:
    text = "<tool_call>\nget_weather of Paris\n</tool_call> so it is"
    (choice,) = asker.ask(tools=TOOLS, says=text)
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")


@pytest.mark.parametrize("fields", [{"tools": TOOLS, "tool_choice": "none"}, {"tools": []}, {}])
def test_without_tools_nothing_is_called(asker: Asker, fields: dict[str, Any]) -> None:
    (choice,) = asker.ask(says=CALL, **fields)
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


def test_model_is_told_of_no_tools_where_none_may_be_called(client: openai.OpenAI) -> None:
    def num_tokens(**fields: Any) -> int:
        answer = client.chat.completions.create(model="demo", messages=ASKED, max_tokens=1, **fields)
        assert answer.usage is not None
        return int(answer.usage.prompt_tokens)

    assert num_tokens(tools=TOOLS, tool_choice="none") == num_tokens(tools=[]) == num_tokens() < num_tokens(tools=TOOLS)


def test_one_call_is_all_where_no_more_are_wanted(asker: Asker, tokenizer: Any) -> None:
    """Though the model would rather go on: its end is forbidden wherever anything else may come."""
    names = {EOS: -100, "<tool_call>": 100}
    never = {str(tokenizer.convert_tokens_to_ids(own)): bias for own, bias in names.items()}
    for choice in (NAMED, "required"):
        (only,) = asker.ask(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, logit_bias=never)
        assert (len(calls_of(only)), only.finish_reason) == (1, "tool_calls")
    (cut,) = asker.ask(tools=TOOLS, tool_choice="required", logit_bias=never, max_tokens=200)
    assert len(cut.message.tool_calls) > 1 and cut.finish_reason == "length"


def test_call_that_is_cut_off_says_so(asker: Asker) -> None:
    (choice,) = asker.ask(tools=TOOLS, tool_choice=NAMED, max_tokens=50)
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "length" and call.function.arguments.startswith("{")
    with pytest.raises(ValueError):
        json.loads(call.function.arguments)


def test_each_of_several_choices_has_calls_of_its_own(asker: Asker) -> None:
    choices = asker.ask(tools=TOOLS, tool_choice="required", n=3, temperature=1.0, seed=7)
    assert [choice.finish_reason for choice in choices] == ["tool_calls"] * 3
    ids = [call.id for choice in choices for call in choice.message.tool_calls]
    assert len(set(ids)) == len(ids) >= 3


def test_reasoning_that_the_template_has_begun_is_told_apart(asker: Asker) -> None:
    thinks = {"chat_template_kwargs": {"thinks": True}}
    (choice,) = asker.ask(says="Well\n</think>\n\nYes.", extra_body=thinks)
    assert (choice.message.reasoning_content, choice.message.content) == ("Well", "Yes.")
    (choice,) = asker.ask(says="Well", extra_body=thinks)  # which never comes to an end
    assert (choice.message.reasoning_content, choice.message.content) == ("Well", "")


def test_log_probabilities_are_those_of_all_tokens(asker: Asker, client: openai.OpenAI) -> None:
    says = f"<think>so</think>{CALL}"
    fields: Any = {"model": "demo", "messages": ASKED, "tools": TOOLS, "logprobs": True, "temperature": 0}
    fields["extra_body"] = {"guided_choice": [says]}
    whole = client.chat.completions.create(**fields).choices[0].logprobs
    chunks = list(client.chat.completions.create(**fields, stream=True))
    streamed = [own for chunk in chunks if chunk.choices[0].logprobs for own in chunk.choices[0].logprobs.content or []]
    assert whole is not None and whole.content is not None
    assert "".join(own.token for own in whole.content) == says
    assert [own.token for own in streamed] == [own.token for own in whole.content]


def test_conversation_goes_on_with_what_a_tool_has_said(client: openai.OpenAI, asker: Asker) -> None:
    """The openai SDK's own message goes back as it came, then the tool's answer, then the next call."""
    messages: Any = list(ASKED)
    for turn in range(2):
        (choice,) = asker.ask(messages=messages, tools=TOOLS, tool_choice=NAMED)
        (call,) = choice.message.tool_calls
        messages.append(choice.message)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"sunny {turn}"})
    (choice,) = asker.ask(messages=messages, tools=TOOLS, says="It is sunny.")
    assert (choice.message.content, choice.finish_reason) == ("It is sunny.", "stop")
    prompt = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS, max_tokens=1).usage
    shorter = client.chat.completions.create(model="demo", messages=messages[:-1], tools=TOOLS, max_tokens=1).usage
    assert prompt is not None and shorter is not None
    assert prompt.prompt_tokens == shorter.prompt_tokens + len("tool: sunny 1|")


def test_sdks_own_stream_collects_calls(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo", messages=ASKED, tools=TOOLS, extra_body={"guided_choice": [f"I look.\n{CALL}"]}
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [(own.name, json.loads(own.arguments)) for own in done] == [("get_weather", {"city": "Paris", "days": 2})]
    message = stream.get_final_completion().choices[0].message
    assert (message.content, stream.get_final_completion().choices[0].finish_reason) == ("I look.", "tool_calls")


def test_form_is_for_answers_that_call_nothing(asker: Asker) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    (choice,) = asker.ask(tools=TOOLS, tool_choice="required", response_format=form)
    assert calls_of(choice)
    (choice,) = asker.ask(tools=TOOLS, response_format=form)
    assert calls_of(choice) or json.loads(choice.message.content)["ok"] in (True, False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, "needs tools"),
        ({"tool_choice": NAMED}, "needs tools"),
        ({"tools": [NOW], "tool_choice": NAMED}, "'get_weather' is none of the tools: now"),
        ({"tools": TOOLS, "tool_choice": "any"}, "'any', not one of auto, none, required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "names no function"),
        ({"tools": [NOW, NOW]}, "two functions are called 'now'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0: only tools of type 'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "got 'a b'"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "no JSON schema"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "no object"),
        ({"tools": TOOLS, "tool_choice": "required", "min_tokens": 5}, "min_tokens cannot go on"),
        ({"tools": [NOW, UNKNOWN], "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_cannot_be_called_is_refused_by_its_name(server: TorchServe, fields: dict[str, Any], words: str) -> None:
    status, text = post(f"{server.url}/1.0/v1/chat/completions", {"messages": ASKED, "max_tokens": 5, **fields})
    error = json.loads(text)["error"]
    assert status == 400 and words in error["message"]
    assert error["param"] in ("tools", "tool_choice", "min_tokens")


def test_log_says_which_format_was_taken_and_why(server: TorchServe) -> None:
    assert "chat answers are parsed as hermes: '<tool_call>' is in the chat template" in server.log_text()
