"""Single tokens are shown with the bytes that they stand for, in every kind of vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DEMO_MODEL
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ts_parallel.serving.text.token_texts import TokenTexts

DEMO: Any = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_bytes_of_a_texts_tokens_are_those_of_the_text(text: str) -> None:
    texts = TokenTexts(DEMO)
    ids = DEMO(text, add_special_tokens=False).input_ids
    special = set(DEMO.all_special_ids)
    expected = DEMO.decode([token_id for token_id in ids if token_id not in special])
    assert b"".join(texts.bytes_of(token_id) or b"" for token_id in ids).decode() == expected


def test_every_token_of_a_vocabulary_has_a_text_and_no_two_share_one() -> None:
    texts = TokenTexts(DEMO)
    shown = [texts.text_of(token_id) for token_id in range(len(DEMO))]
    assert len(set(shown)) == len(DEMO)


def test_part_of_a_character_is_shown_by_its_bytes() -> None:
    texts = TokenTexts(DEMO)
    parts = [token_id for token_id in DEMO("€", add_special_tokens=False).input_ids if texts.text_of(token_id) != " "]
    shown = "".join(texts.text_of(token_id) for token_id in parts)
    assert shown.count("bytes:") == len(parts) > 1 and shown.replace("bytes:", "") == r"\xe2\x82\xac"


def test_special_tokens_have_a_name_and_no_bytes() -> None:
    texts = TokenTexts(DEMO)
    assert (texts.text_of(1), texts.bytes_of(1)) == ("</s>", None)


def test_token_that_only_the_models_padding_has_is_shown_by_its_number() -> None:
    assert TokenTexts(DEMO).text_of(5000) == "<token 5000>"


@pytest.fixture(scope="module")
def pieces() -> Any:
    """A vocabulary as SentencePiece has them."""
    names = ["<unk>", "▁Hello", "▁", "lo", "<0xE2>", "<0x82>", "<0xAC>", "é"]
    model = models.BPE({name: at for at, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    own = Tokenizer(model)
    own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")


def test_pieces_keep_the_space_before_them_and_bytes_are_bytes(pieces: Any) -> None:
    texts = TokenTexts(pieces)
    assert [texts.bytes_of(at) for at in range(1, 8)] == [
        b" Hello",
        b" ",
        b"lo",
        b"\xe2",
        b"\x82",
        b"\xac",
        "é".encode(),
    ]
    assert texts.text_of(4) == r"bytes:\xe2"
