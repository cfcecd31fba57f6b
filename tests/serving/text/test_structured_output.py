"""Guides let through what is of a form and nothing else, and cost nothing before the first one."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import llguidance
import pytest
from places import DEMO_MODEL
from transformers import AutoTokenizer

from ts_parallel.errors import RequestError
from ts_parallel.serving.text.forms import Form, FormKind
from ts_parallel.serving.text.structured_output import LONGEST_FORM, MOST_CHOICES, Guide, GuideMaker

TOKENIZER: Any = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
MAKER = GuideMaker(TOKENIZER, frozenset({0, 1}), 2048)


def make(kind: FormKind, value: Any) -> Guide:
    (guide,) = MAKER.make(Form(kind, value, "field"), 1)
    return guide


def allowed(guide: Guide) -> set[int]:
    mask = guide.allowed()
    assert len(mask) % 8 == 0
    return {8 * at + bit for at, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1}


def accepts(guide: Guide, text: str) -> bool:
    """Whether each token of the text is let through, and the end after it."""
    for token_id in TOKENIZER(text, add_special_tokens=False).input_ids:
        if guide.is_finished or token_id not in allowed(guide):
            return False
        guide.accept(token_id)
    return guide.is_finished or allowed(guide) >= {0, 1}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("json", SCHEMA, ['{"a":5}', '{"a": -12}', '{\n  "a": 1\n}'], ['{"a":"x"}', "{}", '{"a":1,"b":2}', "[]"]),
        ("json", {"type": "object"}, ['{"x": [1, null, {"y": ""}]}', "{}"], ["[]", "1", '{"x"}']),
        ("json", True, ["[]", "1.5e3", "null", '"é\\n"'], ["nul", "{]"]),
        ("regex", r"[0-9]{2,3}", ["12", "123"], ["1", "1234", "a1"]),
        ("choice", ["yes", "yes, but", 'é"\n\\'], ["yes", "yes, but", 'é"\n\\'], ["no", "yes, b"]),
        ("grammar", 'start: "(" start? ")"', ["()", "((()))"], ["(()", ")("]),
        ("grammar", 'root ::= "(" root? ")"', ["()", "((()))"], ["(()", ")("]),
    ],
)
def test_guide_lets_through_what_is_of_the_form(kind: FormKind, value: Any, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not accepts(make(kind, value), text)] == []
    assert [text for text in bad if accepts(make(kind, value), text)] == []


def test_spaces_come_one_by_one_or_as_an_indentation() -> None:
    assert accepts(make("json", SCHEMA), '{\n        "a": 1\n}')
    assert not accepts(make("json", SCHEMA), '{"a":   1}')


def test_guide_is_finished_where_nothing_may_follow_or_an_end_was_chosen() -> None:
    guide = make("regex", "a{1,2}")
    (letter,) = TOKENIZER("a", add_special_tokens=False).input_ids[-1:]
    guide.accept(letter)
    assert not guide.is_finished and allowed(guide) >= {0, 1, letter}
    other = make("regex", "a{1,2}")
    other.accept(letter)
    guide.accept(1)
    other.accept(letter)
    assert guide.is_finished and other.is_finished and guide.error is other.error is None


def test_guides_of_one_form_know_nothing_of_each_other() -> None:
    first, second = MAKER.make(Form("choice", ["ab", "cd"], "field"), 2)
    before = allowed(second)
    first.accept(min(allowed(first) - {0, 1}))
    assert allowed(second) == before != allowed(first)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("regex", "("), ("json", {"type": 5}), ("grammar", "start: x"), ("grammar", "?"), ("json", {"enum": []})],
)
def test_bad_form_is_refused_in_one_line_with_its_field(kind: FormKind, value: Any) -> None:
    with pytest.raises(RequestError, match="field: ") as refusal:
        make(kind, value)
    assert refusal.value.parameter == "field" and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("choice", [str(number) for number in range(MOST_CHOICES + 1)], "4097 choices, at most 4096"),
        ("choice", ["x" * LONGEST_FORM], "65540 characters, at most 65536"),
        ("regex", "x" * (LONGEST_FORM + 1), "65537 characters, at most 65536"),
        ("grammar", "x" * (LONGEST_FORM + 1), "65537 characters, at most 65536"),
        ("json", {"const": "x" * LONGEST_FORM}, "65549 characters, at most 65536"),
    ],
)
def test_form_that_would_hold_up_all_streams_is_refused_unread(kind: FormKind, value: Any, says: str) -> None:
    with pytest.raises(RequestError, match=f"field: {says}"):
        GuideMaker(object(), frozenset({1}), 9).make(Form(kind, value, "field"), 1)


def test_schema_that_is_nested_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(2000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="field: nested too deep"):
        make("json", schema)


def test_form_that_is_too_complex_from_its_first_token_on_is_not_called_impossible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = llguidance.LLParserLimits
    monkeypatch.setattr(llguidance, "LLParserLimits", lambda **own: limits(**own, max_lexer_states=1))
    with pytest.raises(RequestError, match="field: lexer error: too many states"):
        make("regex", "[a-z]+(.*a){10}")


def test_fault_of_the_library_is_not_shown_to_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "panic: assertion failed: grammar.symbols.len() < u16::MAX as usize - 10"
    broken = SimpleNamespace(is_error=lambda: True, get_error=lambda: message)
    monkeypatch.setattr(llguidance, "LLMatcher", lambda *_, **__: broken)
    with pytest.raises(RequestError, match=r"^field: too complex$"):
        make("grammar", 'start: "a"')


def test_model_without_a_fast_tokenizer_or_an_end_is_refused() -> None:
    for maker in (GuideMaker(object(), frozenset({1}), 9), GuideMaker(TOKENIZER, frozenset(), 9)):
        with pytest.raises(RequestError, match="a fast tokenizer and an end token"):
            maker.make(Form("regex", "a", "field"), 1)


def test_library_is_not_loaded_before_the_first_form() -> None:
    module = "ts_parallel.serving.openai.generation_service"
    code = f"import json, sys, {module}; print(json.dumps('llguidance' in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) is False


def test_as_many_choices_as_there_may_be_can_all_begin_alike() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    form = Form("choice", [f"choice {at:05}" for at in range(MOST_CHOICES)], "guided_choice")
    (guide,) = GuideMaker(tokenizer, frozenset({1}), len(tokenizer)).make(form, 1)
    for token_id in tokenizer("choice 01234", add_special_tokens=False).input_ids:
        assert int.from_bytes(guide.allowed(), "little") >> token_id & 1
        guide.accept(token_id)
        assert guide.error is None
