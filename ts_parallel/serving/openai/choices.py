"""A request's choices: the engine's tokens → pieces of text, with log-probabilities where they are wanted.

Each choice is a sequence of its own in the engine; all of one request leave in one answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ts_parallel.engine.request import Request
from ts_parallel.engine.router import Delivery, TokenRouter
from ts_parallel.errors import EngineError, RequestError, TimedOutError
from ts_parallel.serving.exchange import Reply
from ts_parallel.serving.openai.answers import Answer, Likelihood, ScoredToken, Usage
from ts_parallel.serving.openai.fields.token_details import TokenDetails
from ts_parallel.serving.text.detokenizer import Detokenizer, PromptEnd, TextDecoder
from ts_parallel.serving.text.stop_strings import StopStrings
from ts_parallel.serving.text.token_texts import TokenTexts
from ts_parallel.step_plan import TokenLogprobs

_ERRORS: dict[str, type[RequestError]] = {"engine": EngineError, "time": TimedOutError, "form": RequestError}


def error_of(delivery: Delivery) -> RequestError:
    """What a mailbox's error is to a client."""
    assert delivery.error is not None
    return _ERRORS[delivery.fault](delivery.error)


@dataclass(frozen=True)
class Piece:
    """What is new of a choice. `tokens` are those whose text is out; None where they are not wanted."""

    text: str
    tokens: list[ScoredToken] | None
    finish_reason: str | None


class TokenLog:
    """Holds each token's log-probabilities back until its text may go out: a token could give a stop string away.

    A token that makes no letters yet belongs to the letters that come next.
    """

    def __init__(self, texts: TokenTexts, num_best: int | None = None) -> None:
        """
        Args:
            num_best: of the most likely tokens that are shown in place of each; None: all that are known.
        """
        self._texts = texts
        self._num_best = num_best
        self._num_known = 0  # letters that tokens have made
        self._num_out = 0
        self._unfinished: list[ScoredToken] = []
        self._waiting: deque[tuple[int, ScoredToken]] = deque()  # with where its letters end

    def add(self, token_id: int, logprobs: TokenLogprobs | None, num_letters: int) -> None:
        """The next token has made so many letters certain; only a prompt's first has no log-probabilities."""
        best = [self._likelihood(*other) for other in logprobs.top[: self._num_best]] if logprobs else []
        own = self._likelihood(token_id, logprobs.logprob if logprobs else None)
        self._unfinished.append(ScoredToken(own, tuple(best), self._num_known))
        if num_letters:
            self._num_known += num_letters
            self._waiting += [(self._num_known, token) for token in self._unfinished]
            self._unfinished.clear()

    def end_prompt(self, num_letters: int) -> None:
        """All tokens up to now are those of a prompt of so many letters, be its text as they make it or not."""
        prompt = [*(token for _, token in self._waiting), *self._unfinished]
        self._unfinished.clear()
        self._waiting = deque((0, token) for token in prompt)
        self._num_known = num_letters

    def release(self, num_letters: int, finish_reason: str | None, is_cut: bool) -> list[ScoredToken]:
        """The tokens whose text is out now that `num_letters` more are; at the end all of them.

        Args:
            is_cut: whether a stop string has ended the text: what lies behind the cut never goes out.
        """
        self._num_out += num_letters
        released = []
        while self._waiting and self._waiting[0][0] <= self._num_out:
            released.append(self._waiting.popleft()[1])
        if finish_reason is not None:
            rest = [*(token for _, token in self._waiting), *self._unfinished]
            released += [token for token in rest if not is_cut or token.offset < self._num_out]
            self._waiting.clear()
            self._unfinished.clear()
        return released

    def _likelihood(self, token_id: int, logprob: float | None) -> Likelihood:
        return Likelihood(self._texts.text_of(token_id), self._texts.bytes_of(token_id), logprob)


@dataclass(frozen=True)
class Echo:
    """The text of a prompt that its answers begin with."""

    text: str
    is_all: bool
    """Whether nothing more is wanted; the engine makes one token all the same."""


class Choice:
    """One answer of a request. Owns what its text needs; the engine owns the `request`."""

    def __init__(
        self,
        request: Request,
        decoder: TextDecoder,
        stops: StopStrings,
        texts: TokenTexts | None = None,
        echo: Echo | None = None,
        before: PromptEnd | None = None,
        num_best: int | None = None,
    ) -> None:
        """
        Args:
            texts: where log-probabilities are wanted.
            before: what the answer's text goes on with; a text begins with the answer where it is left out.
            num_best: as for `TokenLog`.
        """
        self.request = request
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._decoder = decoder
        self._detokenizer = Detokenizer(decoder, before)
        self._stops = stops
        self._log = TokenLog(texts, num_best) if texts is not None else None
        self._echo = echo

    @property
    def has_stopped_early(self) -> bool:
        """Whether the engine, which knows no stop strings, would go on."""
        return self._stops.has_stopped

    def read(self, delivery: Delivery) -> Piece | None:
        """What new tokens mean; None where nothing is new, or the choice is over."""
        if self.finish_reason is not None or not (delivery.token_ids or delivery.finish_reason):
            return None
        text = self._begin()
        if self._echo is not None and self._echo.is_all:
            self.finish_reason = "length"
        else:
            text += self._read_tokens(delivery)
            self.finish_reason = "stop" if self._stops.has_stopped else delivery.finish_reason
        tokens = self._log.release(len(text), self.finish_reason, self._stops.has_stopped) if self._log else None
        return Piece(text, tokens, self.finish_reason)

    def _begin(self) -> str:
        """The echo, once."""
        if self._echo is None or self.num_tokens:
            return ""
        if self._log is not None:
            prompt, cut = self.request.prompt_ids, Detokenizer(self._decoder)
            for at, (token_id, logprobs) in enumerate(zip(prompt, [None, *self.request.prompt_logprobs], strict=True)):
                self._log.add(token_id, logprobs, len(cut.add([token_id], at == len(prompt) - 1)))
            self._log.end_prompt(len(self._echo.text))
        return self._echo.text

    def _read_tokens(self, delivery: Delivery) -> str:
        """The text of new tokens: one by one where that matters, for none after a stop string counts."""
        if self._log is None and not self._stops.is_watching:
            self.num_tokens += len(delivery.token_ids)
            return self._detokenizer.add(delivery.token_ids, delivery.is_last)
        pieces = []
        for at, token_id in enumerate(delivery.token_ids):
            is_last = delivery.is_last and at == len(delivery.token_ids) - 1
            self.num_tokens += 1
            text = self._detokenizer.add([token_id], is_last)
            if self._log is not None:
                self._log.add(token_id, delivery.logprobs[at], len(text))
            # What the first min_tokens tokens say ends nothing, as in vLLM.
            pieces.append(self._stops.add(text, is_last, token_id, self.num_tokens > self.request.min_tokens))
            if self._stops.has_stopped:
                break
        return "".join(pieces)


class Engine(Protocol):
    """What a job needs of the engine's thread."""

    router: TokenRouter

    def stop(self, request_id: str) -> None: ...


class GenerationJob:
    """A request that the engine is running as one sequence for each choice. The first bears the request's own name."""

    def __init__(
        self,
        answer: Answer,
        choices: Sequence[Choice],
        num_choices_a_prompt: int,
        engine: Engine,
        details: TokenDetails | None = None,
    ) -> None:
        """
        Args:
            choices: those of the first prompt, then those of the next.
            details: what is put into what the answer says.
        """
        self._answer = answer
        self._choices = choices
        self._engine = engine
        self._details = details
        self._has_begun = False
        self._prompts = [choice.request for choice in choices[::num_choices_a_prompt]]

    def advance(self, delivery: Delivery) -> Reply | None:
        """What to send for new tokens of the first choice, and for those that the others have got meanwhile."""
        others = [self._engine.router.take(choice.request.request_id) for choice in self._choices[1:]]
        deliveries = [delivery, *others]
        pieces = [self._read(number, own) for number, own in enumerate(deliveries)]
        usage = self._usage()
        bodies = [
            self._answer.advance(piece.text, usage, piece.finish_reason, index, piece.tokens)
            for index, piece in enumerate(pieces)
            if piece is not None
        ]
        body = "".join(filter(None, bodies))
        body = body if self._details is None else self._details.into(body)
        for choice, own in zip(self._choices, deliveries, strict=True):
            if own.error is not None and choice.finish_reason is None:
                return self.fail(error_of(own), body)
        is_last = all(choice.finish_reason for choice in self._choices)
        for choice, piece in zip(self._choices, pieces, strict=True):
            if piece is not None and choice.has_stopped_early:
                self._engine.stop(choice.request.request_id)
        if not body and not is_last:
            return None
        is_first, self._has_begun = not self._has_begun, True
        return self._reply(body, is_first, is_last)

    def _read(self, number: int, delivery: Delivery) -> Piece | None:
        choice = self._choices[number]
        num_known = choice.num_tokens
        piece = choice.read(delivery)
        if self._details is not None:
            self._details.note(number, delivery.token_ids[: choice.num_tokens - num_known])
        return piece

    def fail(self, error: RequestError, body: str = "") -> Reply:
        """The last reply, after what came before the error."""
        if not self._has_begun and not body:
            return Reply.refusal(error)
        body += self._answer.fail(error)
        return self._reply(body, not self._has_begun, True)

    @property
    def is_whole(self) -> bool:
        return not self._answer.is_stream

    def _reply(self, body: str, is_first: bool, is_last: bool) -> Reply:
        answer = self._answer
        return Reply(body, is_first, is_last, content_type=answer.content_type, is_stream=answer.is_stream)

    def _usage(self) -> Usage:
        return Usage(
            sum(len(request.prompt_ids) for request in self._prompts),
            sum(choice.num_tokens for choice in self._choices),
            sum(request.num_cached or 0 for request in self._prompts),
        )
