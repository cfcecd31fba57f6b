"""Tokens are the tokenizer's own, other threads go on meanwhile, and no text that could fit is taken for too long."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ts_parallel.serving.text.text_encoder import TextEncoder

ANY_TEXT = st.text(st.one_of(st.sampled_from(" \t\nthelisok"), st.characters(exclude_categories=["Cs"])), max_size=40)


def stripping(kind: str) -> Any:
    """Its special tokens take the white space beside them."""
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, rstrip=True, lstrip=True)])
    return tokenizer


@cache
def made(kind: str) -> tuple[Any, TextEncoder]:
    tokenizer = stripping(kind.removeprefix("stripping ")) if kind.startswith("stripping") else KINDS[kind]()
    return tokenizer, TextEncoder(tokenizer)


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from([*KINDS, *(f"stripping {kind}" for kind in KINDS)]), text=ANY_TEXT)
def test_tokens_are_the_tokenizers_and_at_least_as_many_as_was_said(kind: str, text: str) -> None:
    tokenizer, encoder = made(kind)
    for own in (text, text * 20, f"{text}  \n <|end|>  {text}"):
        ids = tokenizer(own).input_ids
        assert encoder.encode(own) == ids
        plain = encoder.encode(own, add_special_tokens=False)
        assert plain == tokenizer(own, add_special_tokens=False).input_ids
        assert encoder.fewest_tokens(own) <= len(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_long_text_has_many_tokens_without_being_tokenized(kind: str) -> None:
    tokenizer, encoder = made(kind)
    longest = max(len(name.encode()) for name in tokenizer.get_vocab())
    assert encoder.fewest_tokens("the list " * 10000) >= 90000 // longest
    assert encoder.fewest_tokens("") == 0


@pytest.mark.parametrize(
    "text",
    [
        "e\u0301" * 900,  # composed, each pair to one character
        "\u1112\u1161\u11ab" * 900,  # three parts of a syllable to one
        "\u212a" * 900,  # three bytes to one
        "\u03b1\u0313\u0300\u0345" * 900,
    ],
)
def test_text_that_a_normalizer_shortens_is_not_taken_for_longer(text: str) -> None:
    tokenizer, encoder = made("byte level")
    assert encoder.fewest_tokens(text) <= len(tokenizer(text, add_special_tokens=False).input_ids)


def test_white_space_that_goes_into_a_token_counts_for_none() -> None:
    tokenizer, encoder = made("stripping byte level")
    text = "<|end|>" + " \n\u3000" * 5000
    assert encoder.fewest_tokens(text) <= len(tokenizer(text, add_special_tokens=False).input_ids) < 10


def shortening() -> dict[str, Any]:
    """Tokenizers of which one token may stand for any length of text."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fused = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True))
    dropping = Tokenizer(models.BPE({"a": 0}, []))
    kinds = {"words": words, "fused": fused, "dropping": dropping}
    steps = {"strip": normalizers.Strip(), "collapse": normalizers.Replace("  ", ""), "nmt": normalizers.Nmt()}
    steps["accents"] = normalizers.StripAccents()
    for name, step in steps.items():
        own = KINDS["byte level"]().backend_tokenizer
        own.normalizer = step
        kinds[name] = own
    splitting = KINDS["byte level"]().backend_tokenizer
    removed = pre_tokenizers.Split(" ", "removed")
    splitting.pre_tokenizer = pre_tokenizers.Sequence([removed, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    kinds["splitting"] = splitting
    return {name: PreTrainedTokenizerFast(tokenizer_object=own) for name, own in kinds.items()}


@pytest.mark.parametrize("name", shortening())
def test_tokenizer_of_which_a_token_may_be_any_length_refuses_no_text_unread(name: str) -> None:
    tokenizer = shortening()[name]
    encoder = TextEncoder(tokenizer)
    for text in ("\u0301" * 9000, " " * 9000, "zzz" * 9000, "\x00" * 9000):
        assert encoder.fewest_tokens(text) == 0
        assert encoder.encode(text) == tokenizer(text).input_ids


def test_other_threads_go_on_while_a_text_is_tokenized() -> None:
    encoder, is_done, num_turns = made("byte level")[1], threading.Event(), 0

    def work() -> None:
        encoder.encode("return a new list containing the answer; " * 20000)
        is_done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not is_done.wait(0.001):
        num_turns += 1
    thread.join()
    assert num_turns > 20


def test_threads_that_share_a_tokenizer_get_their_own_tokens() -> None:
    tokenizer, encoder = made("metaspace")
    texts = [f"the list {number} " * 500 for number in range(8)]
    expected, found = [tokenizer(text).input_ids for text in texts], dict[int, list[int]]()
    threads = [
        threading.Thread(target=lambda at=at: found.update({at: encoder.encode(texts[at])})) for at in range(len(texts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at] for at in range(len(texts))] == expected
