"""What runs in the next step: first come, first served, within a budget of tokens and blocks.

A request whose reader is slow is paused. It keeps its place, but holds up nobody: others pass it, and it gives them its
seat and its blocks where they need them.

Where a model is cut into pipeline stages, one step is in flight for each; every stage runs them in the order they were
scheduled. So a step may use the keys and values that an earlier one will write, and a block that is given back may be
given away at once: whoever still reads it does so earlier on every stage.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.pacing import PrefillPacer
from ts_parallel.engine.request import FinishReason, Request
from ts_parallel.engine.stats import ABORTED, FAILED, EngineStats, Figures, KVBlocks, Occupancy
from ts_parallel.step_plan import Chunk, NoToken, StepPlan, TokenLogprobs, read_logprobs

_ERRORS = {
    NoToken.NOT_A_NUMBER: "the model's logits for the next token hold NaN, so there is none to choose",
    NoToken.NOTHING_ALLOWED: "no token may come next: all are forbidden, or minus infinity is the model's logit of all",
}


@dataclass(frozen=True)
class TokenOutput:
    """One new token of one request; it is over where there is a `finish_reason`, and has failed with an `error`."""

    request_id: str
    token_id: int | None
    """None only with an `error`: there was none to choose."""
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    fault: Literal["engine", "form"] = "form"
    """What the error came of: the engine, or the form that the answer was to have."""


class Scheduler:
    """Owns the requests: `waiting` by priority, then arrival, `running` by admission. And what is in flight."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_stages: int = 1,
        pacer: PrefillPacer | None = None,
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._in_flight: deque[list[tuple[Request, Chunk]]] = deque()
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._num_stages = num_stages
        self._pacer = pacer
        self._places = count()
        self._stats = EngineStats()

    @property
    def num_in_flight(self) -> int:
        """The steps that were scheduled and not updated."""
        return len(self._in_flight)

    def figures(self) -> Figures:
        """What has happened and what is there; any thread may ask."""
        own = self._blocks
        usage = 1 - own.num_free / own.num_blocks
        blocks = KVBlocks(own.num_blocks, own.block_size, own.caches_prefixes)
        return Figures(self._stats, Occupancy(len(self.running), len(self.waiting), usage), blocks)

    def add(self, request: Request) -> None:
        """Let it wait behind all whose priority is not worse."""
        request.place = next(self._places)
        insort(self.waiting, request, key=_turn)

    def abort(self, request_id: str, reason: str = ABORTED) -> None:
        """Forget a request; one that is not here any more is nobody's loss. `reason` is for the counts alone."""
        for queue in (self.waiting, self.running):
            for request in [request for request in queue if request.request_id == request_id]:
                queue.remove(request)
                self._blocks.release(request)
                self._stats.ended(request, reason)

    def schedule(self, paused: Collection[str] = ()) -> StepPlan:
        """The next step. Decoding requests come first: a long prompt does not hold them up; `paused` ones sit out.

        A running request that finds no free block takes those of a paused one, else of the least urgent: the one whose
        priority is worst, of those the one that came last. Who loses them starts over later: its tokens are recomputed,
        so they stay the same. One that is in flight keeps its blocks, and is waited for; so the more urgent have their
        turn in a step first. So an empty step says that the oldest result in flight is needed first, or, without any,
        nobody but the paused ones is there.
        """
        budget, num_seats = self._max_num_batched_tokens, self._num_seats(paused)
        prefill_budget = self._most_prefill_tokens(paused)
        step: list[tuple[Request, Chunk]] = []
        active = [request for request in _awake(self.running, paused) if request.num_behind]
        for request in sorted(active, key=lambda request: (request.num_behind > 1, _turn(request))):
            is_prefill = request.num_behind > 1
            num_tokens = min(request.num_behind, budget, prefill_budget if is_prefill else 1)
            if not num_tokens or len(step) == num_seats:
                break
            if request in self.running and self._make_room(request, request.num_scheduled + num_tokens, paused):
                step.append((request, self._chunk(request, num_tokens)))
                budget -= num_tokens
                prefill_budget -= num_tokens * is_prefill
            elif request in self.running:
                budget = 0  # it waits for blocks of others, who may neither start anew nor be joined in the meantime
        while budget and prefill_budget and len(step) < num_seats:
            admitted = self._next_admitted(paused)
            if admitted is None:
                break
            num_tokens = min(admitted.num_behind, budget, prefill_budget)
            step.append((admitted, self._chunk(admitted, num_tokens)))
            budget -= num_tokens
            prefill_budget -= num_tokens
        if step:
            self._in_flight.append(step)
        return StepPlan(tuple(chunk for _, chunk in step))

    def update(self, numbers: list[int], seconds: float | None = None) -> list[TokenOutput]:
        """Enter what the oldest step in flight has computed: its result's numbers (`StepPlan`).

        A token of a request that was aborted in the meantime is dropped. `seconds` is what the step took, if known.
        """
        if self._pacer is not None and seconds is not None:
            sizes = [len(chunk.token_ids) for _, chunk in self._in_flight[0]]
            self._pacer.observe(sizes.count(1), sum(size for size in sizes if size > 1), seconds)
        running = set(self.running)
        now = time.perf_counter()
        outputs = []
        step = self._in_flight.popleft()
        chunks = [chunk for _, chunk in step]
        tokens = iter(numbers)
        scores = read_logprobs(chunks, numbers[sum(chunk.is_sampled for chunk in chunks) :])
        for (request, chunk), logprobs in zip(step, scores, strict=True):
            request.num_in_flight -= 1
            if chunk.next_ids:
                request.prompt_logprobs[chunk.start :] = logprobs[: len(chunk.next_ids)]
            token_id = next(tokens) if chunk.is_sampled else None
            if token_id is None or request not in running:
                continue
            outputs.append(self._enter(request, token_id, logprobs[-1] if logprobs else None, now))
        return outputs

    def _enter(self, request: Request, token_id: int, logprobs: TokenLogprobs | None, now: float) -> TokenOutput:
        """Let a running request go on with its next token, or end where it was the last or there is none."""
        if token_id < 0:
            request.error = _ERRORS[NoToken(token_id)]
            self._blocks.forget(request)
            self._end(request, FAILED)
            return TokenOutput(request.request_id, None, None, error=request.error, fault="engine")
        request.append(token_id)
        reason = request.finish_reason()
        error = request.guide.error if request.guide and reason else None
        self._stats.token(request, now)
        if reason is not None:
            self._end(request, FAILED if error else reason)
        return TokenOutput(request.request_id, token_id, reason, logprobs, error)

    def _end(self, request: Request, reason: str) -> None:
        self.running.remove(request)
        self._blocks.release(request)
        self._stats.ended(request, reason)

    def _most_prefill_tokens(self, paused: Collection[str]) -> int:
        """How many tokens of prompts a step may have: all that fit, unless somebody waits for a next token."""
        running = list(_awake(self.running, paused))
        num_decoding = sum(bool(request.output_ids) for request in running)
        if self._pacer is None or not num_decoding:
            return self._max_num_batched_tokens
        waiting = islice(_awake(self.waiting, paused), self._max_num_seqs - len(running))
        num_prompts = len(running) - num_decoding + sum(1 for _ in waiting)
        return self._pacer.most_prefill_tokens(max(1, num_prompts))

    def _num_seats(self, paused: Collection[str]) -> int:
        """How many requests one step may take, so that those which can run make a step for each stage."""
        yielding = self._yielding(paused)
        num_requests = sum(1 for _ in _awake(self.running, paused))
        seats = self._max_num_seqs - (len(self.running) - len(yielding))
        waiting = list(islice(_awake(self.waiting, paused), seats))
        num_free = self._blocks.num_free_without(yielding) if waiting else 0
        for request in waiting:
            num_free -= self._blocks.num_missing(request, request.num_tokens)
            if num_free < 0:
                break
            num_requests += 1
        return -(-num_requests // self._num_stages)

    def _next_admitted(self, paused: Collection[str]) -> Request | None:
        """Let the first who waits and is not paused run, after preempting paused ones that are in its way.

        None where it may not: then nobody overtakes it.
        """
        request = next(_awake(self.waiting, paused), None)
        if request is None:
            return None
        prefix = self._blocks.find_prefix(request)
        if not self._has_place(request, prefix):
            yielding = self._yielding(paused)
            num_seated = len(self.running) - len(yielding)
            if num_seated == self._max_num_seqs or not self._blocks.can_admit(request, prefix, yielding):
                return None
            while not self._has_place(request, prefix):
                self._preempt(yielding.pop(0))
        self.waiting.remove(request)
        self.running.append(request)
        request.num_scheduled = self._blocks.take_prefix(request, prefix)
        if request.num_cached is None:
            request.num_cached = request.num_scheduled
            self._stats.admitted(request, request.num_cached)
        return request

    def _has_place(self, request: Request, prefix: list[int]) -> bool:
        """Whether there are a seat and blocks for it as things are."""
        return len(self.running) < self._max_num_seqs and self._blocks.can_admit(request, prefix)

    def _yielding(self, paused: Collection[str]) -> list[Request]:
        """The running requests that give way to whoever can run, the first first: paused, and not in flight."""
        if not paused:
            return []
        yielding = [own for own in self.running if own.request_id in paused and not own.num_in_flight]
        return sorted(yielding, key=_turn, reverse=True)

    def _chunk(self, request: Request, num_tokens: int) -> Chunk:
        start, end = request.num_scheduled, request.num_scheduled + num_tokens
        self._blocks.hold(request, end)
        request.num_scheduled = end
        self._blocks.remember(request)
        request.num_in_flight += 1
        sampling = request.sampling_now()
        needs_history = sampling.needs_history and end == request.num_tokens
        return Chunk(
            request_id=request.request_id,
            token_ids=request.token_ids(start, end),
            start=start,
            block_ids=request.block_ids[:],
            is_sampled=end == request.num_tokens,
            sampling=sampling,
            prompt_ids=request.packed_prompt if needs_history else b"",
            output_ids=request.pack_output() if needs_history else b"",
            next_ids=request.prompt_ids[start + 1 : end + 1] if request.has_prompt_to_score else (),
            allowed=request.guide.allowed() if request.guide and end == request.num_tokens else b"",
        )

    def _make_room(self, request: Request, num_tokens: int, paused: Collection[str]) -> bool:
        """Whether `request` can hold `num_tokens`, after preempting paused requests, then the least urgent, at worst
        itself.

        Where the next of them is in flight, `request` waits for it: so nobody yields to one that is less urgent.
        """
        while not self._blocks.can_hold(request, num_tokens):
            if len(self.running) == 1:
                return False
            in_flight = [own for own in self.running if own.request_id in paused and own.num_in_flight]
            first = (self._yielding(paused) or in_flight or [max(self.running, key=_turn)])[0]
            if first.num_in_flight:
                return False
            self._preempt(first)
            if first is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._stats.preempted()
        self._blocks.release(request)
        request.num_scheduled = 0
        self.running.remove(request)
        insort(self.waiting, request, key=_turn)


def _awake(requests: Iterable[Request], paused: Collection[str]) -> Iterator[Request]:
    """Those that are not paused."""
    return (request for request in requests if request.request_id not in paused)


def _turn(request: Request) -> tuple[int, int]:
    """What requests are sorted by, the most urgent first: one that was preempted waits where it would, had it never
    run."""
    return request.priority, request.place
