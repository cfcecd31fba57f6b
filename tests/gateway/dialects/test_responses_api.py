"""OpenAI's v1/responses over chat completions, as its own client reads it; the model says what a test has it say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import sse_server
from gateway_process import Gateway, gateway
from sse_server import END, Answer, Cut, Recorder, event, whole

from ts_parallel.errors import RequestError
from ts_parallel.gateway.dialects.responses import ResponseStore, UnknownResponseError
from ts_parallel.gateway.dialects.responses_input import messages_of, parse_turn
from ts_parallel.gateway.dialects.responses_tools import chat_name

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
FUNCTION: Any = {
    "type": "function",
    "name": "mul",
    "description": "a × b",
    "parameters": {"type": "object"},
    "strict": True,
}


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with sse_server.running(chat=whole({})) as recorder:
        yield recorder


@pytest.fixture(scope="module")
def front(recorder: Recorder) -> Iterator[Gateway]:
    with gateway(f"{recorder.url.removesuffix('/v1')}/predictions/demo") as front:
        yield front


@pytest.fixture
def client(front: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def call(index: int, name: str | None, arguments: str) -> dict[str, Any]:
    own = {"index": index, "function": {"arguments": arguments, **({"name": name} if name else {})}}
    return {**own, "id": f"call_{index}", "type": "function"} if name else own


def streamed(*deltas: dict[str, Any], finish_reason: str = "stop") -> Answer:
    """As our server streams: each event has the counts, the last one no choice."""

    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        for delta in (*deltas, {}):
            reason = None if delta else finish_reason
            choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
            yield event({"choices": [choice], "usage": USAGE})
        yield event({"choices": [], "usage": USAGE}) + END

    return answer


def at_once(message: dict[str, Any], finish_reason: str = "stop", **more: Any) -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason, **more}
    return whole({"choices": [choice], "usage": USAGE})


THOUGHT_AND_CALLS = streamed(
    {"role": "assistant", "reasoning_content": "Let me "},
    {"reasoning_content": "see."},
    {"content": "I "},
    {"content": "ask."},
    {"tool_calls": [call(0, "mul", "")]},
    {"tool_calls": [call(0, None, '{"a":')]},
    {"tool_calls": [call(0, None, " 3}")]},
    {"tool_calls": [call(1, "add", "{}")]},
    finish_reason="tool_calls",
)


def test_whole_answer_has_its_text_and_its_counts(client: Any, recorder: Recorder) -> None:
    recorder.answers["chat"] = at_once({"content": "Paris"})
    response = client.responses.create(model="demo", input="Capital?", instructions="Be brief.", max_output_tokens=5)
    assert (response.status, response.output_text, response.model) == ("completed", "Paris", "demo")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (7, 3, 10)
    assert response.usage.input_tokens_details.cached_tokens == 4
    sent = recorder.bodies[-1]
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capital?"},
    ]
    assert sent["max_completion_tokens"] == 5 and not sent["stream"]
    assert sent.keys() == {"model", "messages", "max_completion_tokens", "stream"}  # nothing that nobody asked for


def test_events_come_in_their_order_and_add_up_to_the_response(client: Any, recorder: Recorder) -> None:
    recorder.answers["chat"] = THOUGHT_AND_CALLS
    events = list(client.responses.create(model="demo", input="3 × 4?", tools=[FUNCTION], stream=True))
    assert [own.sequence_number for own in events] == list(range(len(events)))
    assert [own.type.removeprefix("response.") for own in events] == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    last: Any = events[-1]
    done = [own.item for own in events if own.type == "response.output_item.done"]
    assert last.response.output == done
    thought, said, first, second = last.response.output
    assert thought.content[0].text == "Let me see." and said.content[0].text == "I ask."
    assert (first.name, first.arguments, first.call_id, first.status) == ("mul", '{"a": 3}', "call_0", "completed")
    assert (second.name, second.arguments) == ("add", "{}")
    assert last.response.usage.output_tokens == 3
    added = [own for own in events if own.type == "response.output_item.added"]
    assert [own.output_index for own in added] == [0, 1, 2, 3]
    assert added[2].item.arguments == ""  # as it was then


def test_clients_own_stream_helper_reads_it(client: Any, recorder: Recorder) -> None:
    recorder.answers["chat"] = THOUGHT_AND_CALLS
    with client.responses.stream(model="demo", input="3 × 4?", tools=[FUNCTION]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == "I ask."
    assert [own.name for own in final.output if own.type == "function_call"] == ["mul", "add"]


def test_answer_of_calls_alone_goes_on_from_their_results(client: Any, recorder: Recorder) -> None:
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "mul", "arguments": '{"a": 3}'}},
        {"id": "call_2", "type": "function", "function": {"name": "mul", "arguments": '{"a": 4}'}},
    ]
    recorder.answers["chat"] = at_once({"content": None, "tool_calls": calls}, "tool_calls")
    first = client.responses.create(
        model="demo",
        input="3 and 4?",
        tools=[FUNCTION],
        tool_choice={"type": "function", "name": "mul"},
        parallel_tool_calls=True,
    )
    sent = recorder.bodies[-1]
    own = {key: value for key, value in FUNCTION.items() if key != "type"}
    assert sent["tools"] == [{"type": "function", "function": own}]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "mul"}}
    assert sent["parallel_tool_calls"] is True
    recorder.answers["chat"] = at_once({"content": "12"})
    results: Any = [
        {"type": "function_call_output", "call_id": own.call_id, "output": "12"}
        for own in first.output
        if own.type == "function_call"
    ]
    second = client.responses.create(model="demo", input=results, previous_response_id=first.id)
    assert second.output_text == "12" and second.previous_response_id == first.id
    assert recorder.bodies[-1]["messages"] == [
        {"role": "user", "content": "3 and 4?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "12"},
        {"role": "tool", "tool_call_id": "call_2", "content": "12"},
    ]


def test_instructions_are_of_one_turn_only(client: Any, recorder: Recorder) -> None:
    recorder.answers["chat"] = at_once({"content": "one"})
    first = client.responses.create(model="demo", input="a", instructions="old")
    client.responses.create(model="demo", input="b", instructions="new", previous_response_id=first.id)
    texts = [message["content"] for message in recorder.bodies[-1]["messages"]]
    assert texts == ["new", "a", "one", "b"]


def test_response_is_remembered_unless_it_is_not_to_be(client: Any, recorder: Recorder) -> None:
    recorder.answers["chat"] = at_once({"content": "one"})
    kept = client.responses.create(model="demo", input="a")
    assert client.responses.retrieve(kept.id).output_text == "one"
    client.responses.delete(kept.id)
    gone = client.responses.create(model="demo", input="a", store=False)
    for response_id in (kept.id, gone.id, "resp_never"):
        with pytest.raises(openai.NotFoundError) as refusal:
            client.responses.create(model="demo", input="a", previous_response_id=response_id)
        assert refusal.value.code == "previous_response_not_found"
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response_id)


def test_answer_that_was_cut_short_is_incomplete(client: Any, recorder: Recorder) -> None:
    recorder.answers["chat"] = streamed({"content": "Par"}, finish_reason="length")
    events = list(client.responses.create(model="demo", input="a", stream=True))
    last: Any = events[-1]
    assert last.type == "response.incomplete" and last.response.status == "incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.output[0].status == "incomplete"


def test_empty_answer_is_an_empty_message(client: Any, recorder: Recorder) -> None:
    for answer, is_stream in ((at_once({"content": ""}), False), (streamed({"role": "assistant"}), True)):
        recorder.answers["chat"] = answer
        made: Any = client.responses.create(model="demo", input="a", stream=is_stream)
        response = list(made)[-1].response if is_stream else made
        assert response.status == "completed" and response.output_text == "" and len(response.output) == 1


def test_stream_that_fails_says_so_in_its_last_event(client: Any, recorder: Recorder) -> None:
    def cut(_: dict[str, Any]) -> Iterator[bytes]:
        yield event({"choices": [{"index": 0, "delta": {"content": "Par"}, "finish_reason": None}]})
        raise Cut

    def failing(_: dict[str, Any]) -> Iterator[bytes]:
        yield event({"choices": [{"index": 0, "delta": {"content": "Par"}, "finish_reason": None}]})
        yield event({"error": {"message": "no token may come", "type": "server_error", "code": 500}}) + END

    for answer, says in ((cut, "in the middle of its answer"), (failing, "no token may come")):
        recorder.answers["chat"] = answer
        last: Any = list(client.responses.create(model="demo", input="a", stream=True))[-1]
        assert last.type == "response.failed" and says in last.response.error.message
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(last.response.id)


def test_logprobs_come_where_they_are_asked_for(client: Any, recorder: Recorder) -> None:
    token = {"token": "Par", "logprob": -0.5, "bytes": [80], "top_logprobs": []}
    recorder.answers["chat"] = at_once({"content": "Par"}, logprobs={"content": [token]})
    response: Any = client.responses.create(
        model="demo", input="a", top_logprobs=2, include=["message.output_text.logprobs"]
    )
    assert recorder.bodies[-1]["logprobs"] is True and recorder.bodies[-1]["top_logprobs"] == 2
    assert response.output[0].content[0].logprobs[0].logprob == -0.5


def test_form_and_effort_have_their_chat_names(client: Any, recorder: Recorder) -> None:
    recorder.answers["chat"] = at_once({"content": "{}"})
    form: Any = {"type": "json_schema", "name": "answer", "schema": {"type": "object"}, "strict": True}
    client.responses.create(
        model="demo", input="a", text={"format": form}, reasoning={"effort": "low"}, extra_body={"top_k": 3}
    )
    sent = recorder.bodies[-1]
    schema = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert sent["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert sent["reasoning_effort"] == "low" and sent["top_k"] == 3


def test_tool_that_takes_a_text_is_a_function_to_the_model(client: Any, recorder: Recorder) -> None:
    patch: Any = {"type": "custom", "name": "apply_patch", "description": "a patch"}
    search: Any = {"type": "web_search"}
    text = "*** Begin\n+é"
    recorder.answers["chat"] = streamed(
        {"tool_calls": [call(0, "apply_patch", json.dumps({"input": text})[:9])]},
        {"tool_calls": [call(0, None, json.dumps({"input": text})[9:])]},
        finish_reason="tool_calls",
    )
    events = list(client.responses.create(model="demo", input="a", tools=[patch, search], stream=True))
    last: Any = events[-1]
    (made,) = last.response.output
    assert (made.type, made.name, made.input) == ("custom_tool_call", "apply_patch", text)
    assert [tool["function"]["name"] for tool in recorder.bodies[-1]["tools"]] == ["apply_patch"]
    again = messages_of([made.model_dump(), {"type": "custom_tool_call_output", "call_id": "call_0", "output": "ok"}])
    assert json.loads(again[0]["tool_calls"][0]["function"]["arguments"]) == {"input": text}
    assert again[1] == {"role": "tool", "tool_call_id": "call_0", "content": "ok"}


LIST: Any = {"type": "function", "name": "list", "description": "Lists", "parameters": {"type": "object"}}
CRM: Any = {"type": "namespace", "name": "crm", "description": "Customers", "tools": [LIST]}
SEARCH: Any = {"type": "tool_search", "execution": "client", "description": "Finds", "parameters": {"type": "object"}}


@pytest.mark.parametrize("is_stream", [False, True])
def test_function_of_a_namespace_is_called_by_both_names(client: Any, recorder: Recorder, is_stream: bool) -> None:
    calls = [call(0, "crm__list", "{}"), call(1, "list", "{}")]
    answer = streamed({"tool_calls": calls}, finish_reason="tool_calls")
    recorder.answers["chat"] = answer if is_stream else at_once({"tool_calls": calls}, "tool_calls")
    made: Any = client.responses.create(model="demo", input="a", tools=[CRM, LIST], stream=is_stream)
    response = list(made)[-1].response if is_stream else made
    assert [(own.namespace, own.name) for own in response.output] == [("crm", "list"), (None, "list")]
    assert [tool["function"]["name"] for tool in recorder.bodies[-1]["tools"]] == ["crm__list", "list"]
    client.responses.create(model="demo", input=[own.model_dump(exclude_none=True) for own in response.output])
    (message,) = recorder.bodies[-1]["messages"]
    assert [own["function"]["name"] for own in message["tool_calls"]] == ["crm__list", "list"]


def test_names_of_namespaces_are_no_longer_than_a_functions() -> None:
    names = {chat_name(name, "mcp__" + "x" * 70) for name in ("one", "two")}
    assert len(names) == 2 and {len(own) for own in names} == {64}
    assert chat_name("one", "mcp__") == "mcp__one" and chat_name("one") == chat_name("one", None) == "one"
    with pytest.raises(RequestError, match="two tools are called 'crm__list'"):
        parse_turn({"input": "a", "tools": [CRM, CRM]})


def test_search_for_tools_is_the_clients_and_what_it_brings_is_offered(client: Any, recorder: Recorder) -> None:
    deferred = {**LIST, "name": "later", "defer_loading": True}
    calls = [call(0, "tool_search", '{"query": "customers", "limit": 3}')]
    recorder.answers["chat"] = at_once({"tool_calls": calls}, "tool_calls")
    asked: Any = client.responses.create(model="demo", input="a", tools=[SEARCH, deferred, FUNCTION])
    assert [tool["function"]["name"] for tool in recorder.bodies[-1]["tools"]] == ["tool_search", "mul"]
    (search,) = asked.output
    assert (search.type, search.execution, search.call_id) == ("tool_search_call", "client", "call_0")
    assert search.arguments == {"query": "customers", "limit": 3}
    found: Any = {"type": "tool_search_output", "call_id": "call_0", "execution": "client", "tools": [CRM, deferred]}
    recorder.answers["chat"] = at_once({"tool_calls": [call(0, "crm__list", "{}")]}, "tool_calls")
    own: Any = {"model": "demo", "tools": [SEARCH, deferred]}
    follow = client.responses.create(input=[found], previous_response_id=asked.id, **own)
    anew = client.responses.create(input=[search.model_dump(), found], **own)
    assert [(made.output[0].namespace, made.output[0].name) for made in (follow, anew)] == [("crm", "list")] * 2
    for sent in recorder.bodies[-2:]:
        assert [tool["function"]["name"] for tool in sent["tools"]] == ["tool_search", "crm__list", "later"]
        *_, said, told = sent["messages"]
        assert json.loads(said["tool_calls"][0]["function"]["arguments"]) == search.arguments
        assert told["role"] == "tool" and [tool["name"] for tool in json.loads(told["content"])] == [
            "crm__list",
            "later",
        ]
    client.responses.create(input="b", previous_response_id=follow.id, **own)  # which remembers what was found
    names = [tool["function"]["name"] for tool in recorder.bodies[-1]["tools"]]
    assert names == ["tool_search", "crm__list", "later"]


def test_search_that_a_server_would_run_is_not_needed() -> None:
    """All that it could find is known and offered."""
    deferred = {**LIST, "defer_loading": True}
    fields = parse_turn({"input": "a", "tools": [{"type": "tool_search"}, deferred]}).fields
    assert [tool["function"]["name"] for tool in fields["tools"]] == ["list"]


def test_choice_among_tools_knows_those_of_namespaces() -> None:
    named = parse_turn({"input": "a", "tools": [CRM], "tool_choice": {"type": "function", "name": "list"}}).fields
    assert named["tool_choice"] == {"type": "function", "function": {"name": "crm__list"}}


def test_items_of_one_turn_are_one_message() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I ask"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x"}]},
        {"type": "function_call_output", "call_id": "2", "output": "y"},
        {"type": "reasoning", "summary": [], "encrypted_content": "…"},
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
        {"role": "developer", "content": "be kind"},
    ]
    made = messages_of(items)
    assert [message["role"] for message in made] == [
        *("user", "assistant", "tool", "tool", "assistant", "assistant", "developer")
    ]
    assert made[0]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert made[1]["reasoning_content"] == "hm" and made[1]["content"] == "I ask"
    assert [own["id"] for own in made[1]["tool_calls"]] == ["1", "2"]
    assert [own["content"] for own in made[2:]] == ["x", "y", "done", "really", "be kind"]


def test_allowed_tools_are_those_that_are_offered() -> None:
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    tools: Any = [{"type": "function", "name": name, "parameters": {}} for name in ("f", "g")]
    fields = parse_turn({"input": "a", "tools": tools, "tool_choice": choice}).fields
    assert [tool["function"]["name"] for tool in fields["tools"]] == ["g"]
    assert fields["tool_choice"] == "required"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": None}, "'input' must be a list"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0: an item of type 'item_reference'"),
        ({"input": [{"role": "cat", "content": "x"}]}, "got 'cat'"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0: a part is of type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": {}}]}, "its arguments as a text"),
        ({"input": "a", "background": True}, "'background' is not supported"),
        ({"input": "a", "conversation": "conv_1"}, "'conversation' is not supported"),
        ({"input": "a", "text": {"format": {"type": "xml"}}}, "got 'xml'"),
        ({"input": "a", "tools": [{"type": "namespace"}]}, "tools.0"),
        ({"input": "a", "instructions": ["x"]}, "'instructions' must be a text"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as refusal:
        parse_turn(body)
    assert says in str(refusal.value)


def test_store_forgets_the_oldest_first_and_stays_within_its_bytes() -> None:
    store = ResponseStore(most=2, most_bytes=10_000)
    for number in range(3):
        store.keep({"id": f"r{number}"}, [])
    with pytest.raises(UnknownResponseError):
        store.find("r0")
    store.find("r1")  # used, so the other one is older now
    store.keep({"id": "r3"}, [])
    with pytest.raises(UnknownResponseError):
        store.find("r2")
    size_of_rest = len(json.dumps([{"id": "large"}, [{"content": ""}]]))
    store.keep({"id": "large"}, [{"content": "x" * (10_000 - size_of_rest)}])
    for name in ("r1", "r3"):
        with pytest.raises(UnknownResponseError):
            store.find(name)
    store.keep({"id": "too large"}, [{"content": "x" * 20_000}])
    store.find("large")
    with pytest.raises(UnknownResponseError):
        store.find("too large")
