"""Bodies are accepted as they are meant, or refused by name."""

from __future__ import annotations

import json

import pytest

from ts_parallel.errors import RequestError
from ts_parallel.runtime.plan_codec import PlanDecoder, PlanEncoder
from ts_parallel.serving.exchange import RawRequest
from ts_parallel.serving.openai.bodies import TokenizeBody, parse_chat, parse_completion, parse_native, parse_plain
from ts_parallel.serving.openai.fields.generation import choice_params
from ts_parallel.serving.openai.fields.messages import plain_messages
from ts_parallel.serving.text.forms import Form
from ts_parallel.serving.text.model_files import SamplingDefaults
from ts_parallel.step_plan import Chunk, SamplingParams, StepPlan


def raw(body: object, content_type: str = "application/json") -> RawRequest:
    return RawRequest("", body, content_type)


def test_raw_text_is_a_prompt_whatever_its_type() -> None:
    assert parse_native(raw(b"Return a list", "text/plain")).prompt == "Return a list"
    assert parse_native(raw("Return a list", "text/plain")).prompt == "Return a list"
    assert parse_native(raw(b"Return a list", "")).prompt == "Return a list"


def test_text_that_looks_like_json_is_json_without_a_content_type() -> None:
    assert parse_native(raw(b'{"prompt": "x", "max_tokens": 3}', "")).max_tokens == 3


def test_all_native_fields_reach_the_generation_parameters() -> None:
    body = parse_native(
        raw({"prompt": "x", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stream": False})
    )
    params = body.generation_params(body.temperature, random_seed=1)
    assert (params.max_tokens, params.sampling.temperature, params.sampling.top_p, params.sampling.seed) == (
        3,
        0.5,
        0.9,
        7,
    )
    assert body.stream is False


def test_a_request_without_a_seed_gets_the_random_one() -> None:
    assert parse_native(raw({"prompt": "x"})).generation_params(0.0, random_seed=99).sampling.seed == 99


@pytest.mark.parametrize(
    ("body", "parameter", "says"),
    [
        ({"prompt": 5}, "prompt", "string"),
        ({}, "prompt", "required"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens", "integer"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens", "integer"),
        ({"prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature", "finite"),
        ({"prompt": "x", "max_tokens": -2}, "max_tokens", "greater than or equal to -1"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens", "integer"),
        ({"prompt": "x", "top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"prompt": "x", "top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"prompt": "x", "seed": 1.5}, "seed", "integer"),
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": "x", "repetition_penalty": 1e-40}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"prompt": "x", "stream": "yes"}, "stream", "boolean"),
        ({"prompt": "x", "temprature": 1}, "temprature", "did you mean 'temperature'"),
    ],
)
def test_bad_native_field_is_named(body: dict[str, object], parameter: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as refusal:
        parse_native(raw(body))
    assert refusal.value.parameter == parameter
    assert parameter in str(refusal.value)


@pytest.mark.parametrize(("temperature", "used"), [(1e-310, 0.0), (0.99e-5, 0.0), (1e-5, 1e-5), (0.3, 0.3)])
def test_temperature_next_to_0_is_0(temperature: float, used: float) -> None:
    body = parse_native(raw({"prompt": "x", "temperature": temperature}))
    assert body.generation_params(body.temperature, 1).sampling.temperature == used


@pytest.mark.parametrize(("seed", "used"), [(-1, 2**64 - 1), (2**64 + 5, 5), (7, 7), (None, 99)])
def test_seed_is_any_whole_number(seed: int | None, used: int) -> None:
    params = parse_completion(raw({"prompt": "x", "seed": seed})).generation_params(1.0, random_seed=99)
    assert params.sampling.seed == used


def test_no_number_is_too_large_for_a_plan() -> None:
    params = parse_completion(raw({"prompt": "x", "top_k": 2**70, "seed": -(2**70)})).generation_params(1.0, 1)
    plan = StepPlan((Chunk("", (1,), 0, (0,), True, params.sampling),))
    (received,) = PlanDecoder().decode(PlanEncoder().encode(plan)).chunks
    assert received.sampling == params.sampling


def test_null_is_the_default_where_it_means_nothing_else() -> None:
    names = ("min_tokens", "ignore_eos", "include_stop_str_in_output", "priority", "seed", "stop", "top_k", "n", "echo")
    options = {"include_usage": None, "continuous_usage_stats": True}
    body = parse_completion(raw({"prompt": "x", **dict.fromkeys(names), "stream_options": options}))
    assert body.generation_params(0.5, 1) == parse_completion(raw({"prompt": "x"})).generation_params(0.5, 1)
    assert not body.include_stop_str_in_output and body.stream_options and not body.stream_options.include_usage
    assert parse_completion(raw({"prompt": "x", "max_tokens": None})).max_tokens == 16
    native = parse_native(raw({"prompt": "x", "stream": None, "temperature": None}))
    assert (native.stream, native.temperature) == (True, 0.0)
    assert parse_chat(raw({"messages": [{"role": "user"}], "add_generation_prompt": None})).begins_an_answer


HALF = "a\ud800b"


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"prompt": HALF}, "prompt"),
        ({"prompt": ["a", HALF]}, "prompt"),
        ({"prompt": "x", "stop": [HALF]}, "stop"),
        ({"prompt": "x", "guided_json": {"properties": {HALF: {}}}}, "guided_json"),
    ],
)
def test_text_that_is_none_is_refused_with_its_field(fields: dict[str, object], parameter: str) -> None:
    with pytest.raises(RequestError, match=f"^{parameter}: half a surrogate pair") as refusal:
        parse_completion(raw(json.dumps(fields).encode()))
    assert refusal.value.parameter == parameter


def test_text_of_a_message_or_to_be_tokenized_is_looked_at_too() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": HALF}]}
    with pytest.raises(RequestError, match="half a surrogate pair"):
        parse_chat(raw({"messages": [message]}))
    with pytest.raises(RequestError, match="half a surrogate pair"):
        parse_plain(TokenizeBody, raw({"prompt": HALF}))
    with pytest.raises(RequestError, match="half a surrogate pair"):
        parse_native(raw(HALF, "text/plain"))


@pytest.mark.parametrize("kind", [list, dict])
def test_body_that_is_nested_too_deep_is_refused(kind: type) -> None:
    value: object = 1
    for _ in range(950):
        value = [value] if kind is list else {"a": value}
    with pytest.raises(RequestError, match="guided_json: more than 200 levels"):
        parse_completion(raw({"prompt": "x", "guided_json": value}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            r"^response_format\.json_schema\.schema: Field required$",
        ),
        ({"stop": {}}, "^stop: "),
        ({"prompt": [[1], [2, "x"]]}, "^prompt"),
        ({"stream_options": {"include_usage": 1}}, r"^stream_options\.include_usage: "),
    ],
)
def test_place_of_an_error_is_named_in_full(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says) as refusal:
        parse_completion(raw({"prompt": "x", **fields}))
    assert refusal.value.parameter == next(iter(fields))


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "add_generation_prompt", "tools", "messages"])
def test_client_brings_no_template_of_its_own(name: str) -> None:
    fields = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {name: "{{ 1 }}"}}
    with pytest.raises(RequestError, match=f"'{name}' is no variable") as refusal:
        parse_chat(raw(fields))
    assert refusal.value.parameter == "chat_template_kwargs"
    variables = {"enable_thinking": False}
    assert parse_chat(raw({**fields, "chat_template_kwargs": variables})).chat_template_kwargs == variables


@pytest.mark.parametrize(
    "request_",
    [
        raw(b'{"prompt": ', "application/json"),
        raw(b"[1, 2]", "application/json"),
        raw(None, "application/json"),
        raw(b"\xff\xfe", "text/plain"),
        raw({"prompt": ""}, "application/x-www-form-urlencoded"),
    ],
)
def test_body_that_is_neither_json_nor_text_is_refused(request_: RawRequest) -> None:
    with pytest.raises(RequestError, match="body"):
        parse_native(request_)


def test_long_bad_values_are_not_repeated_whole() -> None:
    with pytest.raises(RequestError) as refusal:
        parse_native(raw({"prompt": ["x" * 10_000]}))
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("x", ["x"]),
        ([1, 2], [[1, 2]]),
        (["x"], ["x"]),
        (["x", "y"], ["x", "y"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([], [[]]),
        ([[]], [[]]),
    ],
)
def test_completion_prompts_are_texts_or_token_ids(prompt: object, prompts: object) -> None:
    assert parse_completion(raw({"prompt": prompt})).prompts == prompts


def test_fields_that_benchmark_clients_send_are_accepted() -> None:
    body = parse_completion(
        raw(
            {
                "model": "m",
                "prompt": [1],
                "max_tokens": 4,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
                "stop": None,
                "logprobs": None,
                "best_of": 1,
                "n": 1,
            }
        )
    )
    assert body.ignore_eos and body.stream and body.stream_options and body.stream_options.continuous_usage_stats


@pytest.mark.parametrize("field", [{"suffix": "x"}, {"best_of": 2}, {"tool_choice": "required"}, {"cache_salt": "x"}])
def test_openai_field_that_would_be_ignored_is_refused_instead(field: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(field))) as refusal:
        _ = parse_completion(raw({"prompt": "x", **field})).num_choices
    assert refusal.value.parameter == next(iter(field))


def test_number_of_answers_may_be_said_twice_but_not_contradicted() -> None:
    assert parse_completion(raw({"prompt": "x"})).num_choices == 1
    assert parse_completion(raw({"prompt": "x", "n": 3, "best_of": 3})).num_choices == 3
    with pytest.raises(RequestError, match=r"best_of is 3.*n, 2"):
        _ = parse_completion(raw({"prompt": "x", "n": 2, "best_of": 3})).num_choices


def test_each_answer_has_a_seed_of_its_own_that_comes_of_the_requests() -> None:
    params = parse_completion(raw({"prompt": "x", "seed": 7})).generation_params(1.0, 1)
    seeds = [choice_params(params, number).sampling.seed for number in range(100)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 100
    assert seeds == [choice_params(params, number).sampling.seed for number in range(100)]
    other = parse_completion(raw({"prompt": "x", "seed": 8})).generation_params(1.0, 1)
    assert not set(seeds) & {choice_params(other, number).sampling.seed for number in range(100)}


def test_logprobs_are_counted_as_each_interface_does() -> None:
    assert parse_completion(raw({"prompt": "x"})).num_logprobs is None
    assert parse_completion(raw({"prompt": "x", "logprobs": 0})).num_logprobs == 0
    assert parse_native(raw({"prompt": "x", "logprobs": 4})).num_logprobs == 4
    body = parse_completion(raw({"prompt": "x", "logprobs": 5, "echo": True}))
    params = body.generation_params(0.0, 1)
    assert (params.sampling.num_logprobs, params.scores_prompt) == (5, True)
    assert not parse_completion(raw({"prompt": "x", "logprobs": 5})).generation_params(0.0, 1).scores_prompt
    messages = [{"role": "user", "content": "x"}]
    for fields, wanted in (({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 6}, 6)):
        assert parse_chat(raw({"messages": messages, **fields})).num_logprobs == wanted


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Form("json", {"type": "object"}, "response_format")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            Form("json", SCHEMA, "response_format"),
        ),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Form("json", SCHEMA, "structured_outputs")),
        ({"structured_outputs": {"json_object": True}}, Form("json", {"type": "object"}, "structured_outputs")),
        ({"structured_outputs": {"regex": "a+"}}, Form("regex", "a+", "structured_outputs")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Form("choice", ["a", "b"], "structured_outputs")),
        ({"structured_outputs": {"grammar": "g"}}, Form("grammar", "g", "structured_outputs")),
        ({"guided_json": SCHEMA}, Form("json", SCHEMA, "guided_json")),
        ({"guided_regex": "a+"}, Form("regex", "a+", "guided_regex")),
        ({"guided_choice": ["a"]}, Form("choice", ["a"], "guided_choice")),
        ({"guided_grammar": "g"}, Form("grammar", "g", "guided_grammar")),
    ],
)
def test_form_of_an_answer_is_found_wherever_it_is_said(fields: dict[str, object], form: Form | None) -> None:
    assert parse_completion(raw({"prompt": "x", **fields})).form() == form


@pytest.mark.parametrize(
    ("fields", "parameter", "says"),
    [
        (
            {"guided_regex": "a", "guided_choice": ["a"]},
            "guided_choice",
            "one form, got guided_regex and guided_choice",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "one form"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs the field 'json_schema'"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens", "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"timeout": 0}, "timeout", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "without echo"),
    ],
)
def test_bad_new_field_is_named(fields: dict[str, object], parameter: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as refusal:
        parse_completion(raw({"prompt": "x", **fields})).form()
    assert refusal.value.parameter == parameter


def test_top_logprobs_without_logprobs_are_refused() -> None:
    with pytest.raises(RequestError, match="logprobs to be true") as refusal:
        parse_chat(raw({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}))
    assert refusal.value.parameter == "top_logprobs"


def test_all_sampling_fields_reach_the_generation_parameters() -> None:
    fields: dict[str, object] = {
        "top_k": 5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"7": -3.5},
        "min_tokens": 2,
        "stop_token_ids": [3],
        "priority": -1,
        "ignore_eos": True,
    }
    params = parse_completion(raw({"prompt": "x", **fields})).generation_params(0.5, random_seed=1)
    assert params.sampling == SamplingParams(
        0.5, 1.0, 1, 5, 0.1, 0.9, 1.2, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias=((7, -3.5),)
    )
    assert (params.min_tokens, params.stop_token_ids, params.priority, params.ignore_eos) == (2, (3,), -1, True)


def test_what_is_left_open_is_the_models_own_default() -> None:
    defaults = SamplingDefaults(top_p=0.8, top_k=20, repetition_penalty=1.1)
    own = parse_completion(raw({"prompt": "x", "top_p": 1.0})).generation_params(0.5, 1, defaults).sampling
    assert (own.top_p, own.top_k, own.repetition_penalty) == (1.0, 20, 1.1)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"top_k": -2}, "greater than or equal to -1"),
        ({"min_p": 1.5}, "less than or equal to 1"),
        ({"presence_penalty": 3}, "less than or equal to 2"),
        ({"logit_bias": {"x": 1}}, "'x' is no token id"),
        ({"logit_bias": {"5": 101}}, "not between -100 and 100"),
        ({"stop": ["a", ""]}, "empty stop string"),
        ({"stop": ["a"] * 257}, "257 stop strings, at most 256"),
        ({"stop": ["a" * 4000, "b" * 97]}, "4097 characters in all, at most 4096"),
        ({"bad_words": ["a"] * 257}, "257 bad words, at most 256"),
        ({"bad_words": ["a", " "]}, "empty bad word"),
        ({"allowed_token_ids": []}, "at least 1 item"),
    ],
)
def test_bad_sampling_field_is_named(field: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says) as refusal:
        parse_completion(raw({"prompt": "x", **field}))
    assert refusal.value.parameter == next(iter(field))


def test_chat_messages_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = parse_chat(raw({"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 4}))
    assert plain_messages(body.messages) == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize(
    "messages", [[], [{"content": "x"}], [{"role": "user", "content": 5}], "hello", [{"role": "user", "content": [{}]}]]
)
def test_bad_messages_are_refused(messages: object) -> None:
    with pytest.raises(RequestError) as refusal:
        plain_messages(parse_chat(raw({"messages": messages})).messages)
    assert refusal.value.parameter == "messages"
