"""Token ids → text, a few at a time, so that the pieces joined are the text of all of them."""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\ufffd"  # what a tokenizer shows for the first bytes of a character whose others are still to come


class Detokenizer:
    """One request's text. Holds back what may still change: a character of which only some bytes are here.

    Only the tokens since the last stable point are decoded, so a step costs the same however long the text is; the
    tokens just before them are decoded along, for a tokenizer may drop or add a space at the start of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._context = 0  # first token that is decoded along
        self._stable = 0  # first token whose text is not out yet

    def add(self, token_ids: list[int], is_last: bool) -> str:
        """The text that has become certain. With `is_last`, all of it."""
        self._token_ids += token_ids
        known = self._decode(self._context, self._stable)
        whole = self._decode(self._context, len(self._token_ids))
        if whole.endswith(_INCOMPLETE) and not is_last:
            return ""
        if len(whole) > len(known):
            self._context, self._stable = self._stable, len(self._token_ids)
        return whole[len(known) :]

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._token_ids[start:end], skip_special_tokens=True)
        return text
