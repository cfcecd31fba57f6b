"""One request on its way through the engine."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

from ts_parallel.engine.vocabulary import Vocabulary
from ts_parallel.errors import ContextLengthError, RequestError
from ts_parallel.step_plan import SamplingParams, TokenLogprobs, pack

FinishReason = Literal["stop", "length"]


class TokenGuide(Protocol):
    """What an answer may be. Knows the tokens that it was told, so it outlives a preemption with its request."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow: the answer is whole, or there is an `error`."""
        ...

    @property
    def error(self) -> str | None:
        """Why the answer cannot go on, though it is not whole."""
        ...

    def allowed(self) -> bytes:
        """What the next token may be, as `Chunk.allowed`; something always may."""
        ...

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token."""
        ...


@dataclass(frozen=True)
class GenerationParams:
    """What a client asks for."""

    max_tokens: int | None = None
    """None: as many as there is room for. 0: nothing but what there is to say of the prompt."""
    sampling: SamplingParams = SamplingParams()
    ignore_eos: bool = False
    min_tokens: int = 0
    """The answer does not end by a stop token before it has so many."""
    stop_token_ids: tuple[int, ...] = ()
    priority: int = 0
    """Who waits is admitted in this order, the lowest first; who runs gives its blocks up in the opposite one."""
    scores_prompt: bool = False
    """Whether the log-probabilities of the prompt's own tokens are wanted too."""
    clamps_max_tokens: bool = False
    """Whether more than there is room for means as many as that."""


@dataclass(eq=False)
class Request:
    """What the engine knows of a request. Owned by the scheduler from `add` to `finish`.

    There are no phases: a request is behind by `num_tokens - num_scheduled`, and a step closes a part of that gap.
    Tokens count once they are scheduled, not once they are computed: a request whose next token is on its way is behind
    by nothing.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    eos_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    priority: int = 0
    output_ids: list[int] = field(default_factory=list)
    num_scheduled: int = 0
    """Its first tokens that some step has computed or will, so that their keys and values are there for the next."""
    num_in_flight: int = 0
    """Its chunks that were scheduled and whose step has given no result yet."""
    block_ids: array[int] = field(default_factory=lambda: array("q"))
    num_remembered: int = 0
    """How many of its blocks others may begin with."""
    num_cached: int | None = None
    """How many tokens it did not have to compute when it was first admitted."""
    scores_prompt: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Those of the prompt's tokens from the second on, where `scores_prompt`; whole before the first token is there."""
    guide: TokenGuide | None = None
    arrived: float = field(default_factory=time.perf_counter)
    place: int = 0
    """Its number among those that the scheduler was given: of two with one priority, the lower is admitted first."""
    error: str | None = None
    """Why no next token could be chosen: it ended before its answer was whole."""
    _packed_output: array[int] = field(default_factory=lambda: array("q"), repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_behind(self) -> int:
        return self.num_tokens - self.num_scheduled

    def token_ids(self, start: int, end: int) -> tuple[int, ...]:
        """The tokens from `start` to before `end`, of prompt and output taken together."""
        num_prompt = len(self.prompt_ids)
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        return (
            *self.prompt_ids[start:],
            *self.output_ids[max(0, start - num_prompt) : end - num_prompt],
        )

    @cached_property
    def packed_prompt(self) -> bytes:
        """As `step_plan.pack` has it."""
        return pack(self.prompt_ids)

    def pack_output(self) -> bytes:
        """As `step_plan.pack` has it: what came since it was last asked for is all that is packed."""
        self._packed_output.extend(self.output_ids[len(self._packed_output) :])
        return self._packed_output.tobytes()

    @property
    def has_prompt_to_score(self) -> bool:
        """Whether each token of the prompt must be computed, be it remembered from others or not."""
        return self.scores_prompt and len(self.prompt_logprobs) < len(self.prompt_ids) - 1

    def append(self, token_id: int) -> None:
        """Go on with a new token."""
        self.output_ids.append(token_id)
        if self.guide is not None:
            self.guide.accept(token_id)

    def sampling_now(self) -> SamplingParams:
        """How its next token is chosen: no end before `min_tokens`."""
        if len(self.output_ids) >= self.min_tokens or not self.eos_ids:
            return self.sampling
        forbidden = tuple((token_id, float("-inf")) for token_id in sorted(self.eos_ids))
        return replace(self.sampling, logit_bias=self.sampling.logit_bias + forbidden)

    def finish_reason(self) -> FinishReason | None:
        """Why the last token was the last; None where it was not."""
        if self.output_ids and self.output_ids[-1] in self.eos_ids:
            return "stop"
        if self.guide is not None and self.guide.is_finished:
            return "stop"
        return "length" if len(self.output_ids) >= self.max_tokens else None


def make_request(
    request_id: str,
    prompt_ids: Sequence[int],
    params: GenerationParams,
    *,
    eos_ids: frozenset[int],
    max_model_len: int,
    vocabulary: Vocabulary,
    guide: TokenGuide | None = None,
    prompt_field: str = "prompt",
) -> Request:
    """A request whose lengths are within the engine's, and whose tokens are the model's. Whoever asks passes here.

    Args:
        prompt_field: where the prompt comes from.

    Raises:
        RequestError: the prompt is empty or leaves no room for an answer within `max_model_len`, `max_tokens` is more
            than the room it leaves, a token id is none of the model's, or more tokens are to be named than it has.
    """
    if len(prompt_ids) == 0:
        raise RequestError("the prompt is empty", prompt_field)
    room = room_behind(len(prompt_ids), params.max_tokens, max_model_len, prompt_field)
    max_tokens = room if params.max_tokens is None else params.max_tokens
    if params.clamps_max_tokens:
        max_tokens = min(max_tokens, room)
    if max_tokens > room:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens (max_model_len), but max_tokens is "
            f"{max_tokens}, and after a prompt of {len(prompt_ids)} tokens there is room for {room}: ask for no more, "
            "or let the server cut it down (clamp_max_tokens)",
            "max_tokens",
        )
    if params.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, more than max_tokens, {max_tokens}",
            "min_tokens",
        )
    stops = vocabulary.known(params.stop_token_ids, "stop_token_ids")
    return Request(
        request_id,
        vocabulary.known(prompt_ids, prompt_field),
        max(1, max_tokens),  # a step makes a token all the same, which needs no room: nothing follows it
        _known_sampling(params.sampling, vocabulary),
        (frozenset() if params.ignore_eos else eos_ids) | frozenset(stops),
        params.min_tokens,
        params.priority,
        scores_prompt=params.scores_prompt,
        guide=guide,
    )


def room_behind(num_tokens: int, max_tokens: int | None, max_model_len: int, prompt_field: str = "prompt") -> int:
    """For how many tokens there is room behind a prompt.

    Raises:
        ContextLengthError: for none, or not even for the prompt.
    """
    room = max_model_len - num_tokens
    least, wanted = (0, "") if max_tokens == 0 else (1, " with at least one for the answer")
    if room < least:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens (max_model_len){wanted}, but the prompt "
            f"has {num_tokens} tokens: shorten it",
            prompt_field,
        )
    return room


def _known_sampling(sampling: SamplingParams, vocabulary: Vocabulary) -> SamplingParams:
    """
    Raises:
        RequestError: a token with a bias is none of the model's, or more tokens are to be named than it has.
    """
    if sampling.num_logprobs is not None and not 0 <= sampling.num_logprobs <= vocabulary.size:
        raise RequestError(f"logprobs is {sampling.num_logprobs}, not between 0 and {vocabulary.size}", "logprobs")
    if not sampling.logit_bias:
        return sampling
    token_ids = vocabulary.known((token_id for token_id, _ in sampling.logit_bias), "logit_bias")
    biases = (bias for _, bias in sampling.logit_bias)
    return replace(sampling, logit_bias=tuple(zip(token_ids, biases, strict=True)))
