"""A form's text is text, also where an added token has that name: an answer shows it in full, letter by letter."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
from small_tokenizers import KINDS
from tokenizers import normalizers

from ts_parallel.errors import RequestError
from ts_parallel.serving.text.detokenizer import Detokenizer, TextDecoder
from ts_parallel.serving.text.form_vocabulary import FormVocabulary
from ts_parallel.serving.text.forms import Form, FormKind
from ts_parallel.serving.text.structured_output import GuideMaker

TEXTS = ["ends </s> here", "<tool_call>", " a <tool_call>\nb</s>", "<|im_end|><|im_start|>the", "例 </s>é  <s>"]


@cache
def made(kind: str) -> tuple[Any, GuideMaker]:
    tokenizer = KINDS[kind]()
    return tokenizer, GuideMaker(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))


def written(kind: str, form: Form, seed: int) -> tuple[str, list[int]]:
    """What an answer that chooses by chance among what its guide lets through shows, and its tokens."""
    tokenizer, maker = made(kind)
    (guide,) = maker.make(form, 1)
    chance, ids = random.Random(seed), list[int]()
    while not guide.is_finished and len(ids) < 200:
        mask = guide.allowed()
        allowed = [8 * at + bit for at, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]
        assert allowed, guide.error
        ids.append(chance.choice(allowed))
        guide.accept(ids[-1])
    assert guide.error is None and guide.is_finished
    decoder = TextDecoder(tokenizer)
    text = Detokenizer(decoder, decoder.end_of([tokenizer.bos_token_id], is_kept_whole=True)).add(ids, True)
    return text, ids


def forms(text: str) -> list[tuple[FormKind, Any, str]]:
    quoted = json.dumps(text, ensure_ascii=False)
    return [
        ("choice", [text], text),
        ("choice", [text, text + " or not"], text),
        ("regex", "".join(f"\\x{{{ord(own):x}}}" for own in text), text),
        ("json", {"const": text}, quoted),
        ("json", {"enum": [text, "a" + text]}, quoted),
        ("grammar", f"start: {json.dumps(text)}", text),
        ("grammar", f"root ::= {quoted}", text),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_of_a_form_may_hold_the_text_of_an_added_token(kind: str, text: str) -> None:
    for own, value, shown in forms(text):
        texts = {written(kind, Form(own, value, "field"), seed)[0] for seed in range(6)}
        others = {text + " or not", json.dumps("a" + text, ensure_ascii=False)}
        readable = {json.dumps(json.loads(found), ensure_ascii=False) if own == "json" else found for found in texts}
        assert shown in readable and readable <= {shown, *others}, (own, value)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_properties_and_patterns_may_hold_it_too(kind: str) -> None:
    schema = {
        "type": "object",
        "properties": {"</s>": {"type": "string", "pattern": "^<tool_call>[ab]{2}$"}},
        "required": ["</s>"],
        "additionalProperties": False,
    }
    for seed in range(4):
        value = json.loads(written(kind, Form("json", schema, "field"), seed)[0])
        assert list(value) == ["</s>"] and value["</s>"].removeprefix("<tool_call>") in {"aa", "ab", "ba", "bb"}


@pytest.mark.parametrize("kind", KINDS)
def test_added_token_that_shows_is_what_its_text_is_written_with(kind: str) -> None:
    tokenizer, _ = made(kind)
    mark = tokenizer.convert_tokens_to_ids("<tool_call>")
    _, ids = written(kind, Form("choice", ["a<tool_call>b"], "field"), 0)
    assert mark in ids
    for name in ("</s>", "<|im_end|>"):
        special = tokenizer.convert_tokens_to_ids(name)
        _, ids = written(kind, Form("choice", [f"a{name}b"], "field"), 0)
        assert special not in ids[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_special_token_that_a_grammar_names_as_such_is_one(kind: str) -> None:
    tokenizer, _ = made(kind)
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name in ("<|im_end|>", f"<[{mark}]>"):
        text, ids = written(kind, Form("grammar", f'start: "a" {name} "b"', "field"), 0)
        assert text == "ab" and mark in ids


def test_token_that_the_model_has_not_is_never_allowed() -> None:
    tokenizer = KINDS["byte level"]()
    mark = tokenizer.convert_tokens_to_ids("<tool_call>")
    maker = GuideMaker(tokenizer, frozenset({1}), mark)
    (guide,) = maker.make(Form("choice", ["<tool_call>", "<tool"], "field"), 1)
    assert not (guide.allowed() + bytes(99))[mark // 8] >> mark % 8 & 1


def test_text_that_the_tokenizer_would_change_is_written_as_it_is() -> None:
    tokenizer = KINDS["byte level"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    own = FormVocabulary(tokenizer, len(tokenizer), 1)
    for text in ("The TOKEN", "É", "the token"):
        assert b"".join(own.tokens[token_id] for token_id in own(text)).decode() == text
    assert own("the token") == tokenizer("the token", add_special_tokens=False).input_ids


def test_tokenizer_whose_tokens_depend_on_their_neighbours_is_refused_with_the_reason() -> None:
    tokenizer = KINDS["byte level"]()
    tokenizer.backend_tokenizer.decoder = None
    with pytest.raises(RequestError, match="field: the model's tokenizer: its tokens stand for no bytes"):
        GuideMaker(tokenizer, frozenset({1}), 9).make(Form("regex", "a", "field"), 1)
