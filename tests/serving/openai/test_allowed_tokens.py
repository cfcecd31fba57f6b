"""Limits of single tokens ride on the mask of forms: what is taken out stays out, whatever else is asked for."""

from __future__ import annotations

from typing import Any

import pytest
from places import DEMO_MODEL
from transformers import AutoTokenizer

from ts_parallel.engine.request import TokenGuide
from ts_parallel.engine.vocabulary import Vocabulary
from ts_parallel.errors import RequestError
from ts_parallel.serving.openai.fields.allowed_tokens import LimitMaker
from ts_parallel.serving.text.forms import Form
from ts_parallel.serving.text.structured_output import GuideMaker

EOS = frozenset({0})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def maker(tokenizer: Any) -> LimitMaker:
    return LimitMaker(tokenizer, Vocabulary(len(tokenizer)), EOS)


def allowed(guide: TokenGuide | None) -> set[int]:
    assert guide is not None
    mask = int.from_bytes(guide.allowed(), "little")
    return {token_id for token_id in range(mask.bit_length()) if mask >> token_id & 1}


def test_without_limits_guides_are_as_they_were(maker: LimitMaker) -> None:
    assert maker.limited([None, None], None, []) == [None, None]


def test_only_tokens_that_are_allowed_may_come(maker: LimitMaker, tokenizer: Any) -> None:
    first, second = maker.limited([None, None], [5, 9, 63, 64, 2000], None)
    assert allowed(first) == {5, 9, 63, 64, 2000}
    assert first is not None and second is not first and len(first.allowed()) % 8 == 0
    first.accept(5)
    assert allowed(first) == {5, 9, 63, 64, 2000} and not first.is_finished


@pytest.mark.parametrize("token_ids", [[len(range(2048))], [-1], [2**70]])
def test_token_that_the_model_has_not_is_refused(maker: LimitMaker, token_ids: list[int]) -> None:
    with pytest.raises(RequestError, match="allowed_token_ids") as refusal:
        maker.limited([None], token_ids, None)
    assert refusal.value.parameter == "allowed_token_ids"


def test_bad_word_is_forbidden_alone_and_behind_a_space_where_it_would_be_whole(
    maker: LimitMaker, tokenizer: Any
) -> None:
    (guide,) = maker.limited([None], None, ["returning lists"])
    assert guide is not None
    every = set(range(len(tokenizer)))
    for text in ("returning lists", " returning lists"):
        *before, end = tokenizer(text, add_special_tokens=False).input_ids
        assert before and allowed(guide) == every
        for token_id in before:
            guide.accept(token_id)
        assert allowed(guide) == every - {end}
        guide.accept(7)
    (single,) = maker.limited([None], None, [tokenizer.decode([1500])])
    assert 1500 not in allowed(single) and len(allowed(single)) >= len(every) - 2


def test_form_goes_on_within_the_limits_and_may_end(tokenizer: Any, maker: LimitMaker) -> None:
    guides = GuideMaker(tokenizer, EOS, len(tokenizer))
    form = Form("choice", ["yes", "no"], "guided_choice")
    yes = set(tokenizer("yes", add_special_tokens=False).input_ids)
    (guide,) = maker.limited(guides.make(form, 1), sorted(yes), None)
    assert guide is not None
    answer = []
    while not guide.is_finished:
        (token_id, *_) = allowed(guide) - EOS or EOS
        answer.append(token_id)
        guide.accept(token_id)
    assert tokenizer.decode(answer, skip_special_tokens=True) == "yes" and guide.error is None


def test_limits_that_leave_nothing_are_refused_or_end_the_answer_with_the_reason(
    tokenizer: Any, maker: LimitMaker
) -> None:
    form = Form("choice", ["yes"], "guided_choice")
    with pytest.raises(RequestError, match="none") as refusal:
        maker.limited(GuideMaker(tokenizer, EOS, len(tokenizer)).make(form, 1), [2000], None)
    assert refusal.value.parameter == "allowed_token_ids"
    form = Form("choice", ["returning"], "guided_choice")
    (guide,) = maker.limited(
        GuideMaker(tokenizer, EOS, len(tokenizer)).make(form, 1), None, ["eturning", "returning", "turning"]
    )
    assert guide is not None
    for _ in range(10):
        if guide.is_finished:
            break
        guide.accept(min(allowed(guide)))
    assert guide.is_finished and (guide.error or "").startswith("no token may come next")
