"""Which token ids a model has. Knows no tokenizer: who has one lends the names of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import index
from typing import Any

from ts_parallel.errors import RequestError

_LONGEST_ECHO = 60  # characters of what is no token id that an error repeats


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a model has embeddings and logits for: the ids from 0 to before `size`."""

    size: int
    name_of: Callable[[int], str | None] = lambda token_id: None
    """What the tokenizer calls a token, be it the model's or not; None where it knows none of this id."""

    def known(self, token_ids: Iterable[Any], parameter: str) -> tuple[int, ...]:
        """The same ids as plain numbers, of whatever type of whole numbers they were.

        Args:
            parameter: where they come from.

        Raises:
            RequestError: one is none of the model's, or no token id at all. It says which, and where it stands.
        """
        known = tuple(token_ids)
        if not set(map(type, known)) <= {int}:
            known = tuple(_whole(own, at, parameter) for at, own in enumerate(known))
        if known and not (min(known) >= 0 and max(known) < self.size):
            at, outside = next((at, own) for at, own in enumerate(known) if not 0 <= own < self.size)
            name = self.name_of(outside)
            raise RequestError(
                f"token id {outside}{f' ({name!r})' if name else ''} at position {at} of {parameter} is outside the "
                f"model's vocabulary of {self.size}",
                parameter,
            )
        return known


def _whole(value: Any, at: int, parameter: str) -> int:
    """The number that `value` is: an int, or one of numpy's or torch's. No bool, though it could be taken for one."""
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise RequestError(f"{repr(value)[:_LONGEST_ECHO]} at position {at} of {parameter} is no token id", parameter)
