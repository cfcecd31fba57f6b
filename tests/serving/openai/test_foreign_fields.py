"""Fields that this server does not have pass where they change no answer, and are refused by name where they would."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ts_parallel.errors import RequestError
from ts_parallel.serving.exchange import RawRequest
from ts_parallel.serving.openai.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    NativeBody,
    TokenizeBody,
    TokenizeChatBody,
    parse_chat,
    parse_completion,
    parse_native,
    parse_plain,
    parse_tokenize,
)
from ts_parallel.serving.openai.fields.foreign import ALIASES, NEUTRAL, WITHOUT_EFFECT, ForeignFields

MESSAGES = [{"role": "user", "content": "x"}]


def raw(body: object) -> RawRequest:
    return RawRequest("", body, "application/json")


def chat(foreign: ForeignFields | None = None, **fields: Any) -> ChatBody:
    return parse_chat(raw({"messages": MESSAGES, **fields}), foreign)


def completion(foreign: ForeignFields | None = None, **fields: Any) -> CompletionBody:
    return parse_completion(raw({"prompt": "x", **fields}), foreign)


def native(foreign: ForeignFields | None = None, **fields: Any) -> NativeBody:
    return parse_native(raw({"prompt": "x", **fields}), foreign)


EVERY = (chat, completion, native)
# What clients were seen to send, as they send it.
SENT: dict[str, Any] = {
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "store": True,
    "user": "u",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prediction": {"type": "content", "content": "x"},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "function_call": "auto",
    "functions": [],
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "mirostat": 0,
    "tfs_z": 1,
    "do_sample": True,
    "no_repeat_ngram_size": 0,
    "guided_decoding_backend": "auto",
    "cache_prompt": True,
    "request_id": "r",
    "detokenize": True,
    "logits_processors": [],
    "dry_multiplier": 0.0,
    "xtc_probability": 0,
    "watermark": False,
    "return_token_ids": False,
    "add_special_tokens": False,
}


@pytest.mark.parametrize("parse", EVERY)
@pytest.mark.parametrize("name", SENT)
def test_what_changes_no_answer_passes(parse: Any, name: str) -> None:
    parse(**{name: SENT[name]})


@pytest.mark.parametrize("parse", EVERY)
def test_null_of_any_field_passes(parse: Any) -> None:
    names = {*ALIASES, *NEUTRAL, *WITHOUT_EFFECT, "never_heard_of", "temprature"}
    for body in (ChatBody, CompletionBody, NativeBody):
        names |= {name for name, field in body.model_fields.items() if not field.is_required()}
    plain = parse().model_dump()
    assert parse(**dict.fromkeys(names)).model_dump() == plain


@pytest.mark.parametrize("parse", EVERY)
@pytest.mark.parametrize("name", NEUTRAL)
def test_what_would_change_the_answer_passes_at_neutral_values_alone(parse: Any, name: str) -> None:
    if name in type(parse()).model_fields:  # which this body has
        return
    for value in NEUTRAL[name]:
        parse(**{name: value})
    with pytest.raises(RequestError, match=f"'{name}' is not supported, got 'other'") as refusal:
        parse(**{name: "other"})
    assert (refusal.value.parameter, refusal.value.code) == (name, "unsupported_parameter")


def test_refusal_says_what_may_be_sent_instead() -> None:
    with pytest.raises(RequestError, match=r"'functions' .* \(it may be \[\]; use tools\)"):
        chat(functions=[{"name": "f"}])
    with pytest.raises(RequestError, match=r"'length_penalty' is not supported, got 2 \(it may be 1\)"):
        chat(length_penalty=2)


@pytest.mark.parametrize("name", ALIASES)
def test_other_servers_name_means_the_same(name: str) -> None:
    own = ALIASES[name]
    value: Any = {"stop": ["a"], "guided_json": {"type": "object"}, "guided_grammar": 'start: "a"'}.get(own, 1)
    assert completion(**{name: value}) == completion(**{own: value})
    assert completion(**{name: value, own: value}) == completion(**{own: value})
    other: Any = {"stop": ["b"], "guided_json": True, "guided_grammar": "x"}.get(own, 2)
    with pytest.raises(RequestError, match=f"{own} and {name} are the same"):
        completion(**{name: value, own: other})


@pytest.mark.parametrize("parse", EVERY)
def test_unknown_name_is_told_once_and_not_for_ever(parse: Any, caplog: pytest.LogCaptureFixture) -> None:
    foreign = ForeignFields()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            parse(foreign, never_heard_of=1, metadata={"a": 1}, logit_processor_args=None)
        assert [record.getMessage() for record in caplog.records] == [
            "requests have the field 'never_heard_of', which is unknown here and was ignored (told once)"
        ]
        for number in range(1000):
            parse(foreign, **{f"zz{number}" + "z" * 500: 1})
    assert len(caplog.records) == 200
    assert max(len(record.getMessage()) for record in caplog.records) < 200


@pytest.mark.parametrize("name", ["temprature", "max_token", "stopp", "top_pp", "frequency_penality", "logit_biass"])
def test_slip_of_the_pen_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"unknown field '{name}': did you mean") as refusal:
        completion(**{name: 1})
    assert (refusal.value.parameter, refusal.value.code) == (name, "unknown_parameter")


def test_unknown_inside_stream_options_passes_and_inside_a_form_does_not(caplog: pytest.LogCaptureFixture) -> None:
    options = {"include_usage": True, "include_obfuscation": False, "other": 1, "null": None}
    body = chat(stream_options=options)
    assert body.stream_options is not None and body.stream_options.include_usage
    assert "'stream_options.other'" in caplog.text and "null" not in caplog.text
    assert chat(structured_outputs={"regex": "a", "structural_tag": None}).form() is not None
    for form in (
        {"structured_outputs": {"regex": "a", "structural_tag": "x"}},
        {"response_format": {"type": "text", "a": 1}},
    ):
        with pytest.raises(RequestError, match="not permitted"):
            chat(**form)


@pytest.mark.parametrize("parse", EVERY)
@pytest.mark.parametrize("field", [{"metadata": {}}, {"never_heard_of": None}, {"max_new_tokens": 3}, {"tfs_z": 1}])
def test_strict_refuses_every_unknown_field(parse: Any, field: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"unknown field '{next(iter(field))}'"):
        parse(ForeignFields(is_strict=True), **field)
    parse(ForeignFields(is_strict=True), max_tokens=3, skip_special_tokens=False)


def test_strict_takes_some_of_openais_own_at_neutral_values() -> None:
    strict = ForeignFields(is_strict=True)
    chat(strict, store=False, echo=False, tool_choice="auto", suffix="")
    for field in ({"store": True}, {"suffix": "x"}):
        with pytest.raises(RequestError, match="not supported"):
            chat(strict, **field)


def test_other_bodies_pass_over_unknown_fields_too() -> None:
    assert parse_plain(DetokenizeBody, raw({"tokens": [1.0, 2], "x": 1})).tokens == [1, 2]
    assert isinstance(parse_tokenize(raw({"prompt": "x", "model": "m", "y": 1})), TokenizeBody)
    assert isinstance(parse_tokenize(raw({"messages": MESSAGES, "tools": [], "y": 1})), TokenizeChatBody)
    with pytest.raises(RequestError, match="prompt: Field required"):
        parse_tokenize(raw({"text": "x"}), ForeignFields())


@pytest.mark.parametrize("field", ["max_tokens", "top_k", "seed", "n", "min_tokens", "logprobs", "priority"])
def test_whole_number_may_be_written_as_a_float(field: str) -> None:
    own = completion(**{field: 2.0})
    assert own == completion(**{field: 2}) and type(getattr(own, field)) is int
    with pytest.raises(RequestError, match=f"{field}: .*integer"):
        completion(**{field: 2.5})


def test_whole_numbers_of_lists_may_be_too() -> None:
    assert completion(prompt=[1.0, 2]).prompt == [1, 2]
    assert completion(prompt=[[1.0], [2]]).prompt == [[1], [2]]
    assert completion(stop_token_ids=[5.0]).stop_token_ids == [5]
    assert chat(top_logprobs=3.0, logprobs=True).num_logprobs == 3
    assert native(temperature=1.0).temperature == 1.0
    for fields in ({"prompt": [1.5]}, {"stop_token_ids": [float("inf")]}, {"stream": 1.0}, {"prompt": 1.0}):
        with pytest.raises(RequestError):
            completion(**fields)


@pytest.mark.parametrize("parse", EVERY)
def test_minus_1_and_0_have_the_meanings_that_clients_give_them(parse: Any) -> None:
    params = parse(max_tokens=-1).generation_params(1.0, 1)
    assert params.max_tokens is None
    assert parse(n_predict=-1.0).generation_params(1.0, 1).max_tokens is None
    sampling = parse(top_p=0, temperature=1.0).generation_params(1.0, 1).sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)
    assert parse(do_sample=False).generation_params(1.0, 1).sampling.temperature == 0.0
    assert parse(do_sample=True).generation_params(1.0, 1).sampling.temperature == 1.0


def test_newer_name_of_max_tokens_counts() -> None:
    for parse in (chat, completion):
        assert parse(max_completion_tokens=7).generation_params(1.0, 1).max_tokens == 7
        assert parse(max_tokens=3, max_completion_tokens=7).generation_params(1.0, 1).max_tokens == 7
        assert parse(max_completion_tokens=-1).generation_params(1.0, 1).max_tokens is None
        with pytest.raises(RequestError, match="greater than or equal to 1"):
            parse(max_completion_tokens=0)


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"enable_thinking": True}, {"enable_thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"verbosity": "low", "documents": [{"text": "a"}]}, {"verbosity": "low", "documents": [{"text": "a"}]}),
        ({}, {}),
    ],
)
def test_what_a_template_may_know_is_a_variable_of_it(fields: dict[str, Any], variables: dict[str, Any]) -> None:
    assert chat(**fields).template_variables() == variables


def test_last_message_is_gone_on_with_or_another_is_begun() -> None:
    assert chat().begins_an_answer and not chat(continue_final_message=True).begins_an_answer
    assert not chat(add_generation_prompt=False).begins_an_answer
    with pytest.raises(RequestError, match="set one") as refusal:
        chat(continue_final_message=True, add_generation_prompt=True)
    assert refusal.value.parameter == "continue_final_message"
    with pytest.raises(RequestError, match=r"thinking\.budget_tokens"):
        chat(thinking={"type": "enabled", "budget_tokens": 5})
    with pytest.raises(RequestError, match=r"'cache_salt' is not supported, got 'x'$"):
        chat(cache_salt="x")


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, 10),
        ({"truncate_prompt_tokens": 4}, 4),
        ({"truncate_prompt_tokens": 10}, 10),
        ({"truncate_prompt_tokens": 11}, 10),
        ({"truncate_prompt_tokens": -1, "max_tokens": 3}, 5),
        ({"truncate_prompt_tokens": -1, "max_tokens": -1}, 7),
        ({"truncate_prompt_tokens": -1, "max_tokens": 99}, 1),
    ],
)
def test_last_tokens_of_a_prompt_are_kept(fields: dict[str, Any], kept: int) -> None:
    assert completion(**fields).truncated(list(range(10)), max_model_len=8) == list(range(10))[10 - kept :]
