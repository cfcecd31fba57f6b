"""Single tokens as clients are shown them. A token's bytes need not be whole characters."""

from __future__ import annotations

import re
from typing import Any


class TokenTexts:
    """Token id → bytes and text. Special tokens have names, but no bytes: they show in no answer's text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab().values())
        self.special_ids = special_ids_of(tokenizer)
        decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self._byte_of = _byte_of_letter() if "ByteLevel(" in decoder else {}
        self._has_underlines = "\u2581" in decoder or "Metaspace(" in decoder
        self._known: dict[int, bytes] = {}

    @property
    def knows_bytes(self) -> bool:
        """Whether each token stands for bytes of its own, whatever stands beside it."""
        return bool(self._byte_of) or self._has_underlines

    def special_names(self, num_tokens: int) -> dict[int, str]:
        """What stands in a text for those of the model's tokens that show in none."""
        own = sorted(token_id for token_id in self.special_ids if token_id < num_tokens)
        return {token_id: self._tokenizer.convert_ids_to_tokens(token_id) for token_id in own}

    def bytes_of(self, token_id: int) -> bytes | None:
        return None if token_id in self.special_ids else self._bytes_or_name(token_id)

    def text_of(self, token_id: int) -> str:
        r"""The token's text, or `bytes:\xe2\x80` where it is only a part of a character, as OpenAI has it."""
        own = self._bytes_or_name(token_id)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def _bytes_or_name(self, token_id: int) -> bytes:
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id)
        return self._known[token_id]

    def _read(self, token_id: int) -> bytes:
        name: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if name is None:  # a model's vocabulary may be padded beyond its tokenizer's
            return f"<token {token_id}>".encode()
        if token_id in self.special_ids:
            return name.encode()
        if token_id in self._added:
            return self._added_text(token_id).encode()
        if self._byte_of and all(letter in self._byte_of for letter in name):
            return bytes(self._byte_of[letter] for letter in name)
        if self._has_underlines:
            if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
                return bytes.fromhex(byte[1])
            return name.replace("\u2581", " ").encode()
        text: str = self._tokenizer.decode([token_id])
        return text.encode()

    def _added_text(self, token_id: int) -> str:
        """As it shows behind another token, which is not always its name."""
        before = list(self._tokenizer("a", add_special_tokens=False).input_ids)
        text: str = self._tokenizer.decode([*before, token_id])
        return text.removeprefix(self._tokenizer.decode(before))


def special_ids_of(tokenizer: Any) -> frozenset[int]:
    """The tokens that show in no text: those with a part to play, and what was added as special without one."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, own in added.items() if own.special}


def _byte_of_letter() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes with (Radford et al. 2019, GPT-2).

    A byte that is a visible letter in Latin-1 is that letter; the others are the letters from U+0100 on, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(0x100)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + at): byte for at, byte in enumerate(hidden)}
