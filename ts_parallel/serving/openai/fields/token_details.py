"""`return_token_ids` and `prompt_logprobs`: what vLLM adds to an answer that OpenAI's has no place for.

It is put into what an answer says already, whole or in events, so that answers need not know of it; whoever asks for
neither pays nothing. A completion has all of it in its choices; a chat what is of the prompt beside them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ts_parallel.engine.request import Request
from ts_parallel.serving.exchange import one_line
from ts_parallel.serving.text.token_texts import TokenTexts
from ts_parallel.step_plan import TokenLogprobs

_NEVER = -9999.0  # JSON knows no infinity; OpenAI's clients take this for one
_EVENT, _END_OF_EVENT, _DONE = "data: ", "\n\n", "[DONE]"


@dataclass(frozen=True)
class Wanted:
    """What of it a request asks for."""

    token_ids: bool
    prompt_logprobs: int | None
    """So many of the most likely tokens in place of each of the prompt's."""
    is_chat: bool

    def __bool__(self) -> bool:
        return self.token_ids or self.prompt_logprobs is not None


class TokenDetails:
    """One answer's. Owns the tokens that it has not told of yet."""

    def __init__(self, wanted: Wanted, requests: Sequence[Request], texts: TokenTexts) -> None:
        """
        Args:
            requests: those of its choices.
        """
        self._wanted = wanted
        self._requests = requests
        self._texts = texts
        self._new: list[list[int]] = [[] for _ in requests]
        self._untold = set(range(len(requests)))  # choices of whose prompt nothing was said

    def note(self, choice: int, token_ids: Sequence[int]) -> None:
        """A choice has got these tokens."""
        self._new[choice] += token_ids

    def into(self, body: str) -> str:
        """What the answer says, with what is known of its tokens."""
        if not body.startswith(_EVENT):
            return self._with_details(body) if body else body
        events = body.removesuffix(_END_OF_EVENT).split(_END_OF_EVENT)
        return "".join(f"{_EVENT}{self._with_details(event.removeprefix(_EVENT))}{_END_OF_EVENT}" for event in events)

    def _with_details(self, text: str) -> str:
        if text == _DONE:
            return text
        said: dict[str, Any] = json.loads(text)
        for choice in said.get("choices", [said]):
            index = choice.get("index", 0)
            if self._wanted.token_ids:
                choice["token_ids"], self._new[index] = self._new[index], []
            if index in self._untold and (index == 0 or not self._wanted.is_chat):
                (said if self._wanted.is_chat else choice).update(self._of_prompt(self._requests[index]))
            self._untold.discard(index)
        return one_line(said)

    def _of_prompt(self, request: Request) -> dict[str, Any]:
        details: dict[str, Any] = {}
        if self._wanted.token_ids:
            details["prompt_token_ids"] = list(request.prompt_ids)
        if self._wanted.prompt_logprobs is not None:
            scored = zip(request.prompt_ids[1:], request.prompt_logprobs, strict=True)
            details["prompt_logprobs"] = [None, *(self._scores(token_id, own) for token_id, own in scored)]
        return details

    def _scores(self, token_id: int, own: TokenLogprobs) -> dict[str, dict[str, Any]]:
        """By token id; a token's rank is known as far as the most likely ones go."""
        ranked = {other: (logprob, rank) for rank, (other, logprob) in enumerate(own.top, start=1)}
        best = [other for other, _ in own.top[: self._wanted.prompt_logprobs]]
        scores = {}
        for each in dict.fromkeys([token_id, *best]):
            logprob, rank = ranked.get(each, (own.logprob, None))
            scores[str(each)] = {
                "logprob": max(logprob, _NEVER),
                "rank": rank,
                "decoded_token": self._texts.text_of(each),
            }
        return scores
