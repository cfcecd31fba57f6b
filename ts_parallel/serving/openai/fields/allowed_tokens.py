"""`allowed_token_ids` and `bad_words`: which tokens an answer may have, beside the form that it may have to be of.

They ride on the mask of forms: a `Limits` is an `engine.request.TokenGuide` that takes tokens out of another's, or out
of all. As in vLLM, a bad word is the tokens that the tokenizer makes of it, alone and behind a space: the last of them
is forbidden where the others have just come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from ts_parallel.engine.request import TokenGuide
from ts_parallel.engine.vocabulary import Vocabulary
from ts_parallel.errors import RequestError

_BITS_OF_WORD = 64
_NOTHING_LEFT = "no token may come next: allowed_token_ids, bad_words and the form of the answer leave none"


class Limits:
    """One answer's. Owns its last tokens; the mask is made as soon as a token has come, so that an answer which cannot
    go on ends by that."""

    def __init__(self, allowed: int, num_bytes: int, bad: Sequence[Sequence[int]], inner: TokenGuide | None) -> None:
        """
        Args:
            allowed: a bit for each token.
            num_bytes: of a mask.
            bad: sequences of tokens that are not to be.
        """
        self._always = allowed
        self._num_bytes = num_bytes
        self._bad = bad
        self._inner = inner
        self._last: deque[int] = deque(maxlen=max(map(len, bad), default=1))
        self._now = self._next_mask()

    @property
    def is_finished(self) -> bool:
        return not self._now or (self._inner is not None and self._inner.is_finished)

    @property
    def error(self) -> str | None:
        inner = None if self._inner is None else self._inner.error
        return inner or (None if self._now else _NOTHING_LEFT)

    def allowed(self) -> bytes:
        return self._now.to_bytes(self._num_bytes, "little")

    def accept(self, token_id: int) -> None:
        self._last.append(token_id)
        if self._inner is not None:
            self._inner.accept(token_id)
            if self._inner.is_finished:
                return
        self._now = self._next_mask()

    def _next_mask(self) -> int:
        mask = self._always
        if self._inner is not None:
            mask &= int.from_bytes(self._inner.allowed()[: self._num_bytes], "little")
        last = tuple(self._last)
        for *before, end in self._bad:
            if not before or last[-len(before) :] == tuple(before):
                mask &= ~(1 << end)
        return mask


class LimitMaker:
    """Makes the limits of requests. Knows the tokenizer, by which words are tokens."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._num_bytes = -(-vocabulary.size // _BITS_OF_WORD) * (_BITS_OF_WORD // 8)

    def limited(
        self,
        guides: Sequence[TokenGuide | None],
        allowed_token_ids: Sequence[int] | None,
        bad_words: Sequence[str] | None,
    ) -> list[TokenGuide | None]:
        """The same guides within these limits. A form may end though its end is not among the tokens that are allowed.

        Raises:
            RequestError: a token is none of the model's, or nothing is left to begin with.
        """
        if allowed_token_ids is None and not bad_words:
            return list(guides)
        size = self._vocabulary.size
        allowed, ends = (1 << size) - 1, _mask(own for own in self._eos_ids if own < size)
        if allowed_token_ids is not None:
            allowed = _mask(self._vocabulary.known(allowed_token_ids, "allowed_token_ids"))
        bad = self._sequences(bad_words or ())
        limited = [Limits(allowed if own is None else allowed | ends, self._num_bytes, bad, own) for own in guides]
        if any(own.error is not None for own in limited):
            raise RequestError(_NOTHING_LEFT, "bad_words" if allowed_token_ids is None else "allowed_token_ids")
        return list(limited)

    def _sequences(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word.lstrip(), " " + word.lstrip()):
                ids = tuple(self._tokenizer(text, add_special_tokens=False).input_ids)
                if ids and max(ids) < self._vocabulary.size:
                    found[ids] = None
        return list(found)


def _mask(token_ids: Iterable[int]) -> int:
    """A bit for each."""
    token_ids = list(token_ids)
    bits = bytearray(max(token_ids, default=0) // 8 + 1)
    for token_id in token_ids:
        bits[token_id // 8] |= 1 << token_id % 8
    return int.from_bytes(bits, "little")
