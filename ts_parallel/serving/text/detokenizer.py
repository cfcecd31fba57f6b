"""Token ids → text, a few at a time, so that the pieces joined are the text of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_INCOMPLETE = "\ufffd"  # what a tokenizer shows for the first bytes of a character whose others are still to come


class Detokenizer:
    """One request's text. Holds back what may still change: a character of which only some bytes are here.

    Only the tokens since the last stable point are decoded, so a step costs the same however long the text is; the
    tokens just before them are decoded along, for a tokenizer may drop or add a space at the start of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = plain_decode(tokenizer)
        self._token_ids: list[int] = []
        self._context = 0  # first token that is decoded along
        self._stable = 0  # first token whose text is not out yet
        self._known = ""  # the text of the tokens from the one to the other

    def add(self, token_ids: list[int], is_last: bool) -> str:
        """The text that has become certain. With `is_last`, all of it."""
        self._token_ids += token_ids
        whole = self._decode(self._token_ids[self._context :])
        known = self._known
        if whole.endswith(_INCOMPLETE) and not is_last:
            return ""
        if len(whole) > len(known):
            self._context, self._stable = self._stable, len(self._token_ids)
            self._known = self._decode(self._token_ids[self._context :])
        return whole[len(known) :]


def plain_decode(tokenizer: Any) -> Callable[[list[int]], str]:
    """`tokenizer.decode` without special tokens.

    transformers' own asks of each token in turn what type it is, several times; between two steps of a model that is
    long. Where it would then only hand them on, they go to the tokenizers library at once.
    """
    kind = type(tokenizer)
    hands_on = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerBase.decode
        and kind._decode is PreTrainedTokenizerFast._decode
        and not tokenizer.clean_up_tokenization_spaces
    )
    decode = tokenizer.backend_tokenizer.decode if hands_on else tokenizer.decode

    def text_of(token_ids: list[int]) -> str:
        text: str = decode(token_ids, skip_special_tokens=True)
        return text

    return text_of
