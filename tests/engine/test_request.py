"""A request knows its tokens and its end, and is refused where it cannot fit."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ts_parallel.engine.request import GenerationParams, Request, make_request
from ts_parallel.engine.vocabulary import Vocabulary
from ts_parallel.errors import ContextLengthError, RequestError
from ts_parallel.step_plan import SamplingParams, TokenLogprobs, pack

EOS = frozenset({7, 8})
VOCABULARY = Vocabulary(100, {100: "<|extra|>"}.get)
PARAMETERS = ("prompt", "logit_bias", "stop_token_ids")


def make(prompt_ids: list[int], params: GenerationParams, max_model_len: int = 10) -> Request:
    return make_request("a", prompt_ids, params, eos_ids=EOS, max_model_len=max_model_len, vocabulary=VOCABULARY)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="the prompt is empty") as refusal:
        make([], GenerationParams(1))
    assert refusal.value.parameter == "prompt"


def test_prompt_that_leaves_no_room_for_an_answer_is_refused_with_both_numbers() -> None:
    with pytest.raises(RequestError, match=r"is 10 tokens \(max_model_len\) with .* has 10 tokens") as refusal:
        make([1] * 10, GenerationParams())
    assert refusal.value.parameter == "prompt"
    assert make([1] * 9, GenerationParams()).max_tokens == 1


def test_prompt_alone_may_fill_the_model_and_needs_no_room_for_an_answer() -> None:
    assert make([1] * 10, GenerationParams(0)).max_tokens == 1  # which the last step makes, and nothing follows
    with pytest.raises(RequestError, match=r"is 10 tokens \(max_model_len\), .* has 11 tokens"):
        make([1] * 11, GenerationParams(0))


def test_more_tokens_than_there_is_room_for_are_refused_with_all_numbers() -> None:
    with pytest.raises(
        ContextLengthError, match=r"is 10 tokens .* max_tokens is 5, .* 6 tokens .* room for 4"
    ) as refusal:
        make([1] * 6, GenerationParams(5))
    assert (refusal.value.parameter, refusal.value.code) == ("max_tokens", "context_length_exceeded")
    assert make([1] * 6, GenerationParams(4)).max_tokens == 4


def test_more_tokens_than_there_is_room_for_are_as_many_as_that_where_they_are_but_a_wish() -> None:
    for wanted in (4, 5, 2**70):
        assert make([1] * 6, GenerationParams(wanted, clamps_max_tokens=True)).max_tokens == 4
    assert make([1] * 6, GenerationParams(3, clamps_max_tokens=True)).max_tokens == 3
    with pytest.raises(ContextLengthError, match="has 10 tokens"):
        make([1] * 10, GenerationParams(5, clamps_max_tokens=True))
    with pytest.raises(RequestError, match="min_tokens is 5, more than max_tokens, 4"):
        make([1] * 6, GenerationParams(9, min_tokens=5, clamps_max_tokens=True))


def test_request_without_max_tokens_may_fill_the_model() -> None:
    assert make([1, 2, 3], GenerationParams()).max_tokens == 7


def test_request_keeps_what_the_client_asked_for() -> None:
    sampling = SamplingParams(temperature=0.5, top_p=0.9, seed=3)
    made = make([1, 2, 3], GenerationParams(2, sampling))
    assert (made.request_id, made.prompt_ids, made.sampling, made.eos_ids) == ("a", (1, 2, 3), sampling, EOS)


@pytest.mark.parametrize("token_id", [100, -1, 10**7, 10**30])
@pytest.mark.parametrize("parameter", ["prompt", "logit_bias", "stop_token_ids"])
def test_token_id_that_the_model_has_not_is_refused_with_its_place(parameter: str, token_id: int) -> None:
    prompt, bias, stops = ([1, 99, token_id] if name == parameter else [1] for name in PARAMETERS)
    sampling = SamplingParams(logit_bias=tuple((own, 1.0) for own in bias))
    name = r" \('<\|extra\|>'\)" if token_id == 100 else ""
    says = f"^token id {token_id}{name} at position 2 of {parameter} is outside the model's vocabulary of 100$"
    with pytest.raises(RequestError, match=says) as refusal:
        make(prompt, GenerationParams(2, sampling, stop_token_ids=tuple(stops)))
    assert refusal.value.parameter == parameter


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1], np.bool_(True), np.float32(1), torch.tensor([1, 2])])
@pytest.mark.parametrize("parameter", ["prompt", "logit_bias", "stop_token_ids"])
def test_what_is_no_token_id_is_refused_with_its_place(parameter: str, value: Any) -> None:
    prompt, bias, stops = ([1, value] if name == parameter else [1] for name in PARAMETERS)
    sampling = SamplingParams(logit_bias=tuple((own, 1.0) for own in bias))
    says = f"{re.escape(repr(value))} at position 1 of {parameter} is no token id"
    with pytest.raises(RequestError, match=says) as refusal:
        make(prompt, GenerationParams(2, sampling, stop_token_ids=tuple(stops)))
    assert refusal.value.parameter == parameter


def test_whole_numbers_of_other_types_are_token_ids() -> None:
    wholes: Any = [np.array([0, 99]), [np.int32(0), torch.tensor(99)], torch.tensor([0, 99])]
    for prompt in wholes:
        sampling = SamplingParams(logit_bias=((prompt[1], 1.0),))
        made = make(prompt, GenerationParams(2, sampling, stop_token_ids=(prompt[1],)))
        assert (made.prompt_ids, made.sampling.logit_bias, made.eos_ids) == ((0, 99), ((99, 1.0),), EOS | {99})
        assert {type(own) for own in (*made.prompt_ids, *made.eos_ids, made.sampling.logit_bias[0][0])} == {int}


@pytest.mark.parametrize("num_logprobs", [-1, 101])
def test_more_tokens_than_the_model_has_cannot_be_named(num_logprobs: int) -> None:
    with pytest.raises(RequestError, match=f"logprobs is {num_logprobs}, not between 0 and 100") as refusal:
        make([1], GenerationParams(2, SamplingParams(num_logprobs=num_logprobs)))
    assert refusal.value.parameter == "logprobs"
    assert make([1], GenerationParams(2, SamplingParams(num_logprobs=100))).sampling.num_logprobs == 100


def test_new_request_is_behind_by_its_prompt() -> None:
    made = make([1, 2, 3], GenerationParams(2))
    assert (made.num_tokens, made.num_behind) == (3, 3)
    made.num_scheduled = 3
    made.output_ids.append(9)
    assert (made.num_tokens, made.num_behind) == (4, 1)


def test_answer_goes_on_until_max_tokens() -> None:
    made = make([1], GenerationParams(2))
    assert made.finish_reason() is None
    made.output_ids.append(1)
    assert made.finish_reason() is None
    made.output_ids.append(1)
    assert made.finish_reason() == "length"


@pytest.mark.parametrize("eos", sorted(EOS))
def test_answer_stops_at_any_end_token(eos: int) -> None:
    made = make([1], GenerationParams(3))
    made.output_ids.append(eos)
    assert made.finish_reason() == "stop"


def test_end_token_as_the_last_of_all_is_a_stop() -> None:
    made = make([1], GenerationParams(1))
    made.output_ids.append(7)
    assert made.finish_reason() == "stop"


def test_end_token_in_the_prompt_ends_nothing() -> None:
    assert make([7], GenerationParams(3)).finish_reason() is None


def test_end_token_is_one_of_many_where_it_is_ignored() -> None:
    made = make([1], GenerationParams(2, ignore_eos=True))
    made.output_ids.append(7)
    assert made.finish_reason() is None
    made.output_ids.append(7)
    assert made.finish_reason() == "length"


@given(
    prompt=st.lists(st.integers(0, 99), min_size=1, max_size=8),
    output=st.lists(st.integers(0, 99), max_size=8),
    ends=st.tuples(st.integers(0, 16), st.integers(0, 16)),
)
def test_any_slice_of_tokens_is_that_of_prompt_and_output_together(
    prompt: list[int], output: list[int], ends: tuple[int, int]
) -> None:
    whole = (*prompt, *output)
    start, end = sorted(min(bound, len(whole)) for bound in ends)
    made = Request("a", tuple(prompt), max_tokens=9, output_ids=output)
    assert made.token_ids(start, end) == whole[start:end]


class OneToken:
    """A guide for an answer of one token."""

    error = None

    def __init__(self) -> None:
        self.is_finished = False

    def allowed(self) -> bytes:
        return (1 << 5).to_bytes(8, "little")

    def accept(self, token_id: int) -> None:
        self.is_finished = True


def test_answer_ends_where_its_guide_is_finished() -> None:
    guide = OneToken()
    made = make_request(
        "a", [1], GenerationParams(5), eos_ids=EOS, max_model_len=10, vocabulary=VOCABULARY, guide=guide
    )
    assert made.finish_reason() is None
    made.append(5)
    assert made.output_ids == [5] and made.finish_reason() == "stop"


def test_prompt_is_to_be_scored_until_all_but_its_first_token_are() -> None:
    made = make([1, 2, 3], GenerationParams(2, scores_prompt=True))
    assert made.has_prompt_to_score
    made.prompt_logprobs += [TokenLogprobs(-1.0), TokenLogprobs(-2.0)]
    assert not made.has_prompt_to_score
    assert not make([1, 2, 3], GenerationParams(2)).has_prompt_to_score
    assert not make([1], GenerationParams(2, scores_prompt=True)).has_prompt_to_score


def test_history_is_packed_as_it_grows() -> None:
    made = Request("a", (3, 2**40), max_tokens=9)
    assert (made.packed_prompt, made.pack_output()) == (pack((3, 2**40)), b"")
    for token in (5, 5, 7):
        made.append(token)
        assert made.pack_output() == pack(made.output_ids)
    made.append(1)
    made.append(2)
    assert made.pack_output() == pack((5, 5, 7, 1, 2)) and made.packed_prompt == pack((3, 2**40))
