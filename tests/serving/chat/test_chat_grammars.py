"""What a model is made to write is a call in its family's form, whatever it would rather write, and reads as one."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from chat_answers import FAMILIES
from chat_tokenizers import chat_tokenizer, ids_of

from ts_parallel.errors import RequestError
from ts_parallel.serving.chat.formats import family_names
from ts_parallel.serving.chat.reader import CallArguments, Called, Said
from ts_parallel.serving.chat.tools import Offer, offer_of
from ts_parallel.serving.chat.turns import Turn, Turns
from ts_parallel.serving.text.detokenizer import TextDecoder
from ts_parallel.serving.text.forms import Form
from ts_parallel.serving.text.structured_output import Guide, GuideMaker

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
OTHERS = {"json": ((), ())}
MARKERS = {name: (own.special, own.added) for name, own in FAMILIES.items()} | OTHERS
KINDS = ("as they are", "special", "added", "text")


class Model:
    """A tokenizer whose markers are tokens of some kind, and what holds its answers to their form."""

    def __init__(self, family: str, kind: str = "as they are", template: str = "") -> None:
        special, added = MARKERS[family]
        every = (*special, *added)
        kinds = {"as they are": (special, added), "special": (every, ()), "added": ((), every), "text": ((), ())}
        self.tokenizer = chat_tokenizer(*kinds[kind], f"tools {template}")
        self.eos = self.tokenizer.eos_token_id
        self.turns = Turns(self.tokenizer, frozenset({self.eos}), family)
        self.maker = GuideMaker(self.tokenizer, frozenset({self.eos}), len(self.tokenizer))

    def open(self, choice: Any, parallel: bool | None = None, prompt: str = "", form: Form | None = None) -> Turn:
        return self.turns.open(offer_of(TOOLS, choice, parallel), prompt, form=form)

    def guide(self, turn: Turn) -> Guide:
        assert turn.form is not None
        (guide,) = self.maker.make(turn.form, 1)
        return guide

    def takes(self, turn: Turn, text: str) -> bool:
        """Whether each token of the text is let through, and the end after it."""
        guide = self.guide(turn)
        for token_id in ids_of(self.tokenizer, text):
            if guide.is_finished or token_id not in allowed(guide):
                return False
            guide.accept(token_id)
        return guide.is_finished or self.eos in allowed(guide)

    def read(self, turn: Turn, ids: Sequence[int]) -> tuple[str, list[tuple[str, Any]]]:
        """Content and calls."""
        decoder = turn.decoder or TextDecoder(self.tokenizer)
        (reader,) = turn.readers(1) or []
        deltas = [*reader.add(decoder.decode(list(ids))), *reader.end(False)]
        names = [own.name for own in deltas if isinstance(own, Called)]
        texts = [
            "".join(o.text for o in deltas if isinstance(o, CallArguments) and o.index == n) for n in range(len(names))
        ]
        content = "".join(own.text for own in deltas if isinstance(own, Said) and own.kind == "content")
        return content, list(zip(names, map(json.loads, texts), strict=True))


def allowed(guide: Guide) -> list[int]:
    return [8 * at + bit for at, byte in enumerate(guide.allowed()) for bit in range(8) if byte >> bit & 1]


def wandered(model: Model, guide: Guide, chance: random.Random, most: int = 400) -> list[int] | None:
    """Tokens of a model that has no idea, but for the end, and for letters that end what goes on; None: no end yet."""
    ids: list[int] = []
    names = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer)))
    ending = {at for at, name in enumerate(names) if (len(name) > 1 and at != model.eos) or name in 'abc"}]1</>'}
    while not guide.is_finished:
        assert guide.error is None
        choices = allowed(guide)
        assert choices
        if model.eos in choices and (len(choices) == 1 or chance.random() < 0.3):
            return ids
        near = [own for own in choices if own in ending] if chance.random() < 0.8 else []
        token_id = chance.choice([own for own in near or choices if own != model.eos])
        guide.accept(token_id)
        ids.append(token_id)
        if len(ids) == most:
            return None
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", family_names())
def test_whatever_is_written_where_a_call_is_required_reads_as_one(family: str, kind: str) -> None:
    model, chance, num_read = Model(family, kind), random.Random(3), 0
    for choice, parallel in (("required", None), ("required", False), (NAMED, None)):
        turn = model.open(choice, parallel)
        for _ in range(5):
            ids = wandered(model, model.guide(turn), chance)
            if ids is None:  # a text goes on and on
                continue
            content, calls = model.read(turn, ids)
            assert (content, bool(calls)) == ("", True)
            assert len(calls) == 1 or (choice, parallel) == ("required", None)
            for name, arguments in calls:
                assert name == "get_weather" or choice == "required"
                assert set(arguments) == (set(SCHEMA["properties"]) if name == "get_weather" else set())
                assert name == "now" or isinstance(arguments["city"], str)
                assert name == "now" or (type(arguments["days"]) is int and arguments["unit"] in ("C", "F"))
                num_read += 1
    assert num_read or kind == "text"


ARGUMENTS = '{"city": "Paris", "days": 2, "unit": "C"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": 5}}\n</tool_call>'
TWO = f"{CALL}\n{CALL}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("choice", "parallel", "good", "bad"),
    [
        (
            "auto",
            None,
            ["", "Hello <b>.", CALL, f"Well.\n{CALL}", TWO, f"{CALL} so", "<think>hm</think>Hello"],
            [OTHER],
        ),
        ("auto", False, ["", "Hello.", CALL, f"Well.\n{CALL}"], [OTHER, TWO]),
        ("required", None, [CALL, TWO, f"<think>hm</think>\n\n{CALL}"], ["", "Hello.", OTHER]),
        ("required", False, [CALL], ["", TWO]),
        (NAMED, None, [CALL], ["", TWO, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>']),
    ],
)
def test_each_choice_lets_through_what_it_allows(
    kind: str, choice: Any, parallel: bool | None, good: list[str], bad: list[str]
) -> None:
    template = "<tool_call> <think> </think>"
    model = Model("hermes", kind, template)
    turn = model.open(choice, parallel)
    assert [text for text in good if not model.takes(turn, text)] == []
    assert [text for text in bad if model.takes(turn, text)] == []


def test_reasoning_that_the_prompt_has_begun_comes_before_a_call() -> None:
    model = Model("hermes", template="<think> </think>")
    turn = model.open("required", prompt="assistant: <think>\n")
    assert model.takes(turn, f"hm\n</think>\n\n{CALL}")
    assert not model.takes(turn, CALL)


@pytest.mark.parametrize(
    ("family", "good", "bad"),
    [
        (
            "llama3",
            ["Hello {", f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}', ""],
            ['{"name": "get_weather", "parameters": {}}', '{"x": 1}'],
        ),
        (
            "gpt_oss",
            [
                "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hello",
                "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>" + ARGUMENTS,
            ],
            ["<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{}", "Hello"],
        ),
        (
            "qwen3_coder",
            [
                "Hello",
                "<tool_call>\n<function=get_weather>\n<parameter=city>\nPa\nris\n</parameter>\n<parameter=days>\n2\n"
                "</parameter>\n<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>",
            ],
            ["<tool_call>\n<function=get_weather>\n</function>\n</tool_call>", "<tool_call>x"],
        ),
    ],
)
def test_strict_functions_are_enforced_once_a_call_begins(family: str, good: list[str], bad: list[str]) -> None:
    model = Model(family)
    turn = model.open("auto")
    assert [text for text in good if not model.takes(turn, text)] == []
    assert [text for text in bad if model.takes(turn, text)] == []


def test_answer_of_a_form_or_a_call_is_either() -> None:
    model = Model("hermes")
    form = Form(
        "json", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, "response_format"
    )
    turn = model.open("auto", form=form)
    assert all(model.takes(turn, text) for text in ('{"a": 1}', CALL))
    assert not any(model.takes(turn, text) for text in ("Hello", '{"b": 1}', OTHER))
    choice = Form("choice", ["yes", "no"], "guided_choice")
    assert model.open("auto", form=choice).form == choice  # a form that knows of no calls


def test_nothing_is_enforced_where_nothing_asks_for_it() -> None:
    model = Model("hermes")
    loose = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": False}}]
    assert model.turns.open(offer_of(loose, "auto", True), "").form is None
    assert model.turns.open(None, "").form is None


def offer(*functions: dict[str, Any], choice: Any = "required") -> Offer | None:
    return offer_of([{"type": "function", "function": own} for own in functions], choice, None)


def test_function_without_a_schema_takes_nothing_and_one_with_any_takes_all() -> None:
    model = Model("hermes")
    turn = model.turns.open(offer({"name": "now"}, {"name": "any", "parameters": {}}), "")
    written = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
    assert model.takes(turn, written.format("now", "{}")) and not model.takes(turn, written.format("now", '{"a": 1}'))
    assert model.takes(turn, written.format("any", '{"a": 1}'))


def test_schemas_definitions_are_known_to_tags() -> None:
    model = Model("qwen3_coder")
    schema = {
        "$defs": {"point": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}},
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/point"}, "note": {"type": "string"}},
        "required": ["at"],
    }
    turn = model.turns.open(offer({"name": "go", "parameters": schema}), "")
    call = "<tool_call>\n<function=go>\n<parameter=at>\n{}\n</parameter>\n</function>\n</tool_call>"
    assert model.takes(turn, call.format("[1, 2]")) and not model.takes(turn, call.format("[1]"))


def test_schema_that_cannot_be_enforced_is_refused_by_name() -> None:
    model = Model("hermes")
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}, "required": ["a"]}
    with pytest.raises(RequestError, match="tool_choice"):
        model.guide(model.turns.open(offer({"name": "f", "parameters": schema}), ""))


def test_model_without_a_format_can_be_made_to_call() -> None:
    tokenizer = chat_tokenizer(template="{{ tools }}{{ messages }}")
    turns = Turns(tokenizer, frozenset({tokenizer.eos_token_id}))
    assert turns.open(offer_of(TOOLS, "auto", None), "").readers(1) is None
    turn = turns.open(offer_of(TOOLS, "required", None), "")
    (reader,) = turn.readers(1) or []
    deltas = reader.add('{"name": "now", "arguments": {}}')
    assert [own.name for own in deltas if isinstance(own, Called)] == ["now"]
    off = Turns(tokenizer, frozenset({tokenizer.eos_token_id}), "none")
    with pytest.raises(RequestError, match="chat_format is none"):
        off.open(offer_of(TOOLS, "required", None), "")


def test_tokenizers_own_template_is_written_as_its_family_where_it_reads_that() -> None:
    own = {
        "start_anchor": "assistant",
        "fields": {
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"content": "text"},
        },
    }
    tokenizer = chat_tokenizer(template="<tool_call>", response_template=own)
    turn = Turns(tokenizer, frozenset({tokenizer.eos_token_id})).open(offer_of(TOOLS, "required", None), "")
    assert turn.form is not None and re.search("<tool_call>", turn.form.value)
    (reader,) = turn.readers(1) or []
    deltas = [*reader.add(CALL), *reader.end(False)]
    assert [json.loads(own.text) for own in deltas if isinstance(own, CallArguments)] == [json.loads(ARGUMENTS)]
