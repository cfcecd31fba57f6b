"""Pieces of text join to the text of all tokens, no character is cut, and an answer goes on with its prompt."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DEMO_MODEL
from small_tokenizers import KINDS
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ts_parallel.serving.text.detokenizer import Detokenizer, PromptEnd, TextDecoder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)


def pieces_of(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], size: int, before: PromptEnd | None = None
) -> list[str]:
    detokenizer = Detokenizer(TextDecoder(tokenizer), before)
    parts = [ids[start : start + size] for start in range(0, len(ids), size)] or [[]]
    return [detokenizer.add(part, is_last=index == len(parts) - 1) for index, part in enumerate(parts)]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), size=st.integers(1, 5))
def test_pieces_join_to_the_whole_text(text: str, size: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(pieces_of(tokenizer, ids, size)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 2047), max_size=40), size=st.integers(1, 4))
def test_pieces_of_any_tokens_join_to_their_text(ids: list[int], size: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    assert "".join(pieces_of(tokenizer, ids, size)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_character_of_several_tokens_comes_out_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("naïve 🙂 日本", add_special_tokens=False).input_ids
    pieces = pieces_of(tokenizer, ids, 1)
    assert len(ids) > len([piece for piece in pieces if piece])  # some tokens are parts of characters
    assert not any("\ufffd" in piece for piece in pieces)


def test_cut_character_at_the_end_is_shown_as_such(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("🙂", add_special_tokens=False).input_ids[:-1]
    assert "".join(pieces_of(tokenizer, ids, 1)) == tokenizer.decode(ids)


def test_special_tokens_have_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces_of(tokenizer, [tokenizer.bos_token_id, tokenizer.eos_token_id], 1) == ["", ""]


@cache
def made(kind: str) -> Any:
    return KINDS[kind]()


def ids_of(tokenizer: Any, *tokens: str) -> list[int]:
    ids: list[int] = tokenizer.convert_tokens_to_ids([own.replace(" ", space_of(tokenizer)) for own in tokens])
    assert None not in ids and tokenizer.unk_token_id not in ids
    return ids


def space_of(tokenizer: Any) -> str:
    return "Ġ" if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) else "▁"


def answer(tokenizer: Any, prompt: list[int], ids: list[int], size: int = 1, is_kept_whole: bool = False) -> str:
    """The text of an answer to a prompt, in pieces of so many tokens."""
    before = TextDecoder(tokenizer).end_of(prompt, is_kept_whole)
    return "".join(pieces_of(tokenizer, ids, size, before))


@pytest.mark.parametrize("kind", KINDS)
def test_answer_keeps_the_space_before_its_first_word(kind: str) -> None:
    tokenizer = made(kind)
    assert answer(tokenizer, tokenizer("the").input_ids, ids_of(tokenizer, " token", " list")) == " token list"
    assert answer(tokenizer, ids_of(tokenizer, " the"), ids_of(tokenizer, " token")) == " token"


@pytest.mark.parametrize("kind", KINDS)
def test_answer_after_special_tokens_goes_on_with_the_text_before_them(kind: str) -> None:
    tokenizer = made(kind)
    prompt = [*tokenizer("the").input_ids, *ids_of(tokenizer, *["<|im_end|>", "<|im_start|>"] * 9)]
    whole = tokenizer.decode([*prompt, *ids_of(tokenizer, " token")], skip_special_tokens=True)
    assert answer(tokenizer, prompt, ids_of(tokenizer, " token")) == " token" == whole.removeprefix("the")


@pytest.mark.parametrize("kind", KINDS)
def test_answer_to_a_prompt_without_text_begins_a_text_unless_it_is_kept_whole(kind: str) -> None:
    tokenizer = made(kind)
    prompt, ids = ids_of(tokenizer, "<s>"), ids_of(tokenizer, " token")
    assert answer(tokenizer, prompt, ids) == tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    assert answer(tokenizer, prompt, ids, is_kept_whole=True) == " token"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_given", [1, 2, 3])
def test_character_that_an_answer_completes_is_its_own_and_nothing_of_the_prompt_is(kind: str, num_given: int) -> None:
    tokenizer = made(kind)
    decoder = TextDecoder(tokenizer)
    for text in ("the \U0001f642", "\u4f8b\u4f8b\u4f8b\U0001f642", "\ufffd\U0001f642"):
        ids = tokenizer(text).input_ids
        at = len(ids) - 4 + num_given
        prompt, rest = ids[:at], [*ids[at:], *ids_of(tokenizer, " token")]
        assert decoder.complete_text(prompt) == text[:-1]
        assert answer(tokenizer, prompt, rest) == text[-1] + " token"


@pytest.mark.parametrize("kind", KINDS)
def test_character_that_cannot_be_read_stays_the_prompts(kind: str) -> None:
    tokenizer = made(kind)
    prompt = tokenizer("the \ufffd").input_ids
    assert answer(tokenizer, prompt, ids_of(tokenizer, " token")) == " token"


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_make_no_character_leave_what_is_out_as_it_is(kind: str) -> None:
    tokenizer = made(kind)
    good = tokenizer("\u4f8b", add_special_tokens=False).input_ids
    ids = [*good, good[-1], *ids_of(tokenizer, " token", " list")]
    text = answer(tokenizer, tokenizer("the").input_ids, ids)
    assert text.lstrip() == "\u4f8b\ufffd token list"


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    text=st.text(st.one_of(st.sampled_from(" thelis\n"), st.characters(exclude_categories=["Cs"])), max_size=30),
    cut=st.integers(0, 60),
    size=st.integers(1, 4),
)
def test_prompt_and_answer_join_to_their_text_wherever_the_border_is(kind: str, text: str, cut: int, size: int) -> None:
    tokenizer = made(kind)
    ids = tokenizer(text).input_ids
    prompt, rest = ids[: min(cut, len(ids))], ids[min(cut, len(ids)) :]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert TextDecoder(tokenizer).complete_text(prompt) + answer(tokenizer, prompt, rest, size) == whole


def test_spaces_that_a_clean_up_takes_away_are_not_sent_before() -> None:
    words = ["the", " ", ".", " n", "'t", " '", "ve", " 'x", "!"]
    own = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="the"))
    own.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, clean_up_tokenization_spaces=True)
    for ids in ([0, 1, 2], [0, 3, 4], [0, 5, 6, 1, 8], [0, 7], [0, 1], [0, 3, 0, 1, 1, 2]):
        assert "".join(pieces_of(tokenizer, ids, 1)) == tokenizer.decode(ids, skip_special_tokens=True)
