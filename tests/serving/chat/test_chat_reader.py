"""A chat answer says the same however it is cut: content, reasoning and calls, of every family, and no text is lost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from chat_answers import FAMILIES, TOOLS, WEATHER, WRITTEN, Written
from chat_tokenizers import EOS, chat_tokenizer, ids_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ts_parallel.serving.chat.formats import ChatFormat, choose_format
from ts_parallel.serving.chat.reader import AnswerReader, CallArguments, Called, Delta, Said
from ts_parallel.serving.chat.tools import offer_of
from ts_parallel.serving.chat.turns import Turns
from ts_parallel.serving.text.detokenizer import Detokenizer, TextDecoder

TOKENIZERS: dict[str, Any] = {
    name: chat_tokenizer(own.special, own.added, f"tools {own.template}") for name, own in FAMILIES.items()
}
ANSWERS = [(name, own) for name, family in FAMILIES.items() for own in family.answers]
OFFER = offer_of(TOOLS, "auto", None)


def format_of(name: str) -> ChatFormat:
    chosen = choose_format(TOKENIZERS[name], "auto")
    assert chosen is not None
    return chosen


FORMATS = {name: format_of(name) for name in FAMILIES}


def reader_of(chat_format: ChatFormat, opening: str = "", with_calls: bool = True) -> AnswerReader:
    template = chat_format.regions(with_calls=with_calls, with_reasoning=True)
    assert template is not None
    return AnswerReader(chat_format, template, opening, TOOLS)


def read(reader: AnswerReader, pieces: Iterable[str], is_cut: bool = False) -> list[Delta]:
    return [*(delta for piece in pieces for delta in reader.add(piece)), *reader.end(is_cut)]


def told(deltas: Sequence[Delta]) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning, and the calls with the texts of their arguments."""
    texts, calls = {"content": "", "reasoning_content": ""}, list[tuple[str, str]]()
    for delta in deltas:
        if isinstance(delta, Said):
            texts[delta.kind] += delta.text
        elif isinstance(delta, Called):
            assert delta.index == len(calls)
            calls.append((delta.name, ""))
        else:
            assert delta.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    return texts["content"], texts["reasoning_content"], calls


def test_every_family_is_told_by_its_signs() -> None:
    assert {name: own.name for name, own in FORMATS.items()} == {name: name for name in FAMILIES}


@pytest.mark.parametrize(("name", "written"), ANSWERS)
def test_answer_of_every_family_says_what_it_says(name: str, written: Written) -> None:
    content, reasoning, calls = told(read(reader_of(FORMATS[name]), [written.text]))
    assert (content, reasoning) == (written.said, written.reasoning)
    assert [(own, json.loads(arguments)) for own, arguments in calls] == list(written.calls)


@pytest.mark.parametrize(("name", "written"), ANSWERS)
def test_letter_by_letter_an_answer_says_the_same(name: str, written: Written) -> None:
    whole = told(read(reader_of(FORMATS[name]), [written.text]))
    assert told(read(reader_of(FORMATS[name]), written.text)) == whole


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_any_cut_of_an_answer_says_the_same(data: st.DataObject) -> None:
    name, written = data.draw(st.sampled_from(ANSWERS))
    # Also where it ends in the middle.
    text = written.text[: data.draw(st.integers(0, len(written.text)))]
    places = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    for is_cut in (False, True):
        whole = told(read(reader_of(FORMATS[name]), [text], is_cut))
        assert told(read(reader_of(FORMATS[name]), pieces, is_cut)) == whole


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_no_call_is_content_to_the_last_letter(data: st.DataObject) -> None:
    """Whatever stands between the markers, where it tells of no call."""
    name = data.draw(st.sampled_from(["hermes", "qwen3_coder", "glm", "phi4", "granite", "mistral", "deepseek"]))
    pieces = ["<", "{", '"name"', ":", "[", "]", "}", '"', "now", "\n", "x", ",", "</", "function", "\\", "```", " "]
    body = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=12)))
    fields = FORMATS[name].fields["tool_calls"]
    text = f"a{fields['open']}{body}{fields.get('close', '')}"
    content, reasoning, calls = told(read(reader_of(FORMATS[name]), text))
    if not calls:
        assert (content, reasoning) == (text, "")


@pytest.mark.parametrize(("name", "written"), ANSWERS)
def test_tokens_of_a_real_tokenizer_say_the_same_one_by_one(name: str, written: Written) -> None:
    """Special markers show to the reader, the end of the answer does not."""
    tokenizer = TOKENIZERS[name]
    turn = Turns(tokenizer, frozenset({tokenizer.eos_token_id})).open(OFFER, "")
    (reader,) = turn.readers(1) or []
    ids = ids_of(tokenizer, written.text + EOS)
    assert tokenizer.eos_token_id in ids
    decoder = turn.decoder or TextDecoder(tokenizer)
    detokenizer = Detokenizer(decoder)
    pieces = [detokenizer.add([token_id], at == len(ids) - 1) for at, token_id in enumerate(ids)]
    content, reasoning, calls = told(read(reader, pieces))
    assert (content, reasoning) == (written.said, written.reasoning)
    assert [(own, json.loads(arguments)) for own, arguments in calls] == list(written.calls)


@pytest.mark.parametrize("name", ["hermes", "llama3", "mistral", "deepseek", "phi4", "gpt_oss"])
def test_arguments_pass_on_as_they_are_written(name: str) -> None:
    """The call once its name is there and its arguments begin, then each letter, not the whole at the end."""
    reader, told_at = reader_of(FORMATS[name]), list[int]()
    written = next(own for own in FAMILIES[name].answers if own.calls and own.calls[0] == WEATHER)
    start = written.text.index(WRITTEN)
    for at, letter in enumerate(written.text[: start + len(WRITTEN)]):
        told_at += [at for delta in reader.add(letter) if isinstance(delta, CallArguments)]
    assert told_at == list(range(start, start + len(WRITTEN)))


def test_text_argument_passes_on_before_its_end() -> None:
    reader = reader_of(FORMATS["qwen3_coder"])
    deltas = reader.add("<tool_call>\n<function=get_weather>\n<parameter=city>\nParis, the")
    assert told(deltas)[2] == [("get_weather", '{"city": "Paris, the')]


@pytest.mark.parametrize("prompt", ["user: hi\nassistant: <think>\n", "assistant: <think>"])
def test_reasoning_that_the_prompt_has_begun_is_reasoning(prompt: str) -> None:
    opening = FORMATS["hermes"].opening_of(prompt, None)
    deltas = read(reader_of(FORMATS["hermes"], opening, with_calls=False), "hm\n</think>\n\nYes.")
    assert told(deltas) == ("Yes.", "hm", [])


@pytest.mark.parametrize("prompt", ["user: what is <think>?\nassistant: ", "assistant: <think>\n\n</think>\n\n", ""])
def test_reasoning_that_the_prompt_has_not_begun_is_content(prompt: str) -> None:
    opening = FORMATS["hermes"].opening_of(prompt, None)
    assert told(read(reader_of(FORMATS["hermes"], opening), "Yes.")) == ("Yes.", "", [])


def test_reasoning_of_a_message_that_is_gone_on_with_is_gone_on_with() -> None:
    opening = FORMATS["hermes"].opening_of("assistant: <think>so", "<think>so")
    assert told(read(reader_of(FORMATS["hermes"], opening), " it is</think>Yes.")) == ("Yes.", "it is", [])


def test_without_tools_calls_are_text() -> None:
    text = FAMILIES["hermes"].answers[0].text
    assert told(read(reader_of(FORMATS["hermes"], with_calls=False), [text])) == (text, "", [])


def test_tokenizers_own_template_is_read_by_transformers() -> None:
    """Such a template tells a call's name by its marker, and its arguments only once they are whole."""
    own = {
        "start_anchor": "assistant:",
        "defaults": {"role": "assistant"},
        "fields": {
            "thinking": {"open": "<|think|>", "close": "<|/think|>"},
            "tool_calls": {
                "open_pattern": r"<call:(?P<name>\w+)>",
                "close": "</call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {"tag_pattern": r"<(?P<key>\w+)>(?P<value>.*?)</\1>"},
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"content": "text"},
        },
    }
    tokenizer = chat_tokenizer(template="assistant:", response_template=own)
    chosen = choose_format(tokenizer, "auto")
    assert chosen is not None and chosen.name == "response_template"
    prompt = "user: x assistant:<|think|>"
    reader = reader_of(chosen, chosen.opening_of(prompt, None))
    text = "hm<|/think|>Well.<call:get_weather><city>Paris</city><days>3</days></call><call:now></call><call:no"
    content, reasoning, calls = told(read(reader, text))
    assert (content, reasoning) == ("Well.<call:no", "hm")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("get_weather", {"city": "Paris", "days": 3}),
        ("now", {}),
    ]


def test_ids_of_calls_are_unique_and_of_the_length_that_a_familys_template_takes() -> None:
    texts = {"hermes": FAMILIES["hermes"].answers[1].text, "mistral": FAMILIES["mistral"].answers[0].text}
    for name, text in texts.items():
        ids = [own.call_id for own in read(reader_of(FORMATS[name]), [text]) if isinstance(own, Called)]
        assert len(set(ids)) == 2
        assert all(own.startswith("call_") if name == "hermes" else len(own) == 9 and own.isalnum() for own in ids)
