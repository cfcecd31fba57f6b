"""Text → token ids, from any thread, and how few tokens a text can have, which is known before it is tokenized."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# How much shorter a step may make a text beyond ASCII: it composes at most four characters, of four bytes at most, to
# one, which has two at least.
_MOST_COMPOSED = 8
# White space beside an added token that strips it goes into that token, however much it is.
_WHITE_SPACE = [
    *map(chr, range(0x09, 0x0E)),
    *" \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000",
    *map(chr, range(0x2000, 0x200B)),
]
_COMPOSING = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
_KEEPING = {"ByteLevel", "Metaspace", "Digits", "Prepend"}


class TextEncoder:
    """Owns nothing but numbers; the tokenizer is lent. While it works, other threads go on."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        kind = type(tokenizer)
        # Where transformers' own way would only hand a text on, and copy what comes back several times.
        self._hands_on = (
            isinstance(tokenizer, PreTrainedTokenizerFast)
            and kind.__call__ is PreTrainedTokenizerBase.__call__
            and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
            and not tokenizer.split_special_tokens
        )
        self._most_bytes_of_a_token: int | None = None
        self._most_composed = 1
        self._strips = False
        if self._hands_on:
            # Else transformers does so at its first text, be another thread in the middle of one or not.
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
            settings = json.loads(tokenizer.backend_tokenizer.to_str())
            self._most_bytes_of_a_token = _most_bytes_of_a_token(settings)
            composing = [own for own in _steps(settings["normalizer"]) if own["type"] in _COMPOSING]
            self._most_composed = _MOST_COMPOSED ** len(composing)
            self._strips = any(own["lstrip"] or own["rstrip"] for own in settings["added_tokens"])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if not self._hands_on:
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
        # A batch, for of one text alone the tokenizers library lets no other thread go on.
        (encoding,) = self._tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def fewest_tokens(self, text: str) -> int:
        """A text has at least so many tokens: 0 where a token may stand for any length of text."""
        if self._most_bytes_of_a_token is None:
            return 0
        num_bytes = len(text) if text.isascii() else len(text.encode(errors="replace")) // self._most_composed
        if self._strips:
            num_bytes -= sum(len(own.encode()) * text.count(own) for own in _WHITE_SPACE)
        return -(-max(0, num_bytes) // self._most_bytes_of_a_token)


def _most_bytes_of_a_token(settings: Mapping[str, Any]) -> int | None:
    """None where it is not certain that every byte of a text is in some token that has no more than its own."""
    steps = [*_steps(settings["normalizer"]), *_steps(settings["pre_tokenizer"])]
    if not all(map(_keeps_each_byte, steps)):
        return None
    model = settings["model"]
    if model["type"] not in ("BPE", "Unigram"):
        return None
    vocabulary = model["vocab"]
    names = [own for own, _ in vocabulary] if isinstance(vocabulary, list) else list(vocabulary)
    is_byte_level = any(own["type"] == "ByteLevel" for own in steps)
    if is_byte_level:
        sizes = [len(own) for own in names]  # a letter is a byte
        has_each_byte = {own for own in names if len(own) == 1} >= set(_byte_letters())
    else:
        sizes = [len(own.encode()) for own in names]
        has_each_byte = bool(model.get("byte_fallback")) and set(names) >= {f"<0x{byte:02X}>" for byte in range(256)}
    if not has_each_byte:  # what no token stands for is left out, or becomes one unknown token, however long it is
        return None
    return max([*sizes, *(len(own["content"].encode()) for own in settings["added_tokens"])])


def _byte_letters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for own in step.get("normalizers", step.get("pretokenizers", [])):
        yield from _steps(own)


def _keeps_each_byte(step: Mapping[str, Any]) -> bool:
    """Whether it takes nothing away from a text; beyond ASCII it may compose characters."""
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return pattern == " " and bool(step["content"])
    if step["type"] in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    return step["type"] in _COMPOSING | _KEEPING
