"""Pieces of text join to the text of all tokens, and no character is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DEMO_MODEL
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ts_parallel.serving.text.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)


def pieces_of(tokenizer: PreTrainedTokenizerFast, ids: list[int], size: int) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
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
