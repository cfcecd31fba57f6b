"""What runs in the next step: first come, first served, within a budget of tokens and blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.request import FinishReason, Request
from ts_parallel.runtime.step import Chunk, StepPlan


@dataclass(frozen=True)
class TokenOutput:
    """One new token of one request; the request is over where there is a `finish_reason`."""

    request_id: str
    token_id: int
    finish_reason: FinishReason | None


class Scheduler:
    """Owns the requests: `waiting` in order of arrival, `running` in order of admission."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Forget a request; one that is not here any more is nobody's loss."""
        for queue in (self.waiting, self.running):
            for request in [request for request in queue if request.request_id == request_id]:
                queue.remove(request)
                self._blocks.release(request)

    def schedule(self, paused: Collection[str] = ()) -> StepPlan:
        """The next step. Decoding requests come first: a long prompt does not hold them up; `paused` ones sit out.

        A running request that finds no free block takes those of the one that was admitted last, which starts over
        later: its tokens are recomputed, so they stay the same.
        """
        budget = self._max_num_batched_tokens
        chunks: list[Chunk] = []
        planned: set[Request] = set()
        active = [request for request in self.running if request.request_id not in paused]
        for request in sorted(active, key=lambda request: request.num_behind > 1):
            if not budget:
                break
            num_tokens = min(request.num_behind, budget)
            if request in self.running and self._make_room(request, request.num_computed + num_tokens, planned):
                chunks.append(self._chunk(request, num_tokens))
                planned.add(request)
                budget -= num_tokens
        while budget and self.waiting and len(self.running) < self._max_num_seqs:
            request = self.waiting[0]
            num_tokens = min(request.num_behind, budget)
            if request.request_id in paused or not self._blocks.can_hold(request, request.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            chunks.append(self._chunk(request, num_tokens))
            budget -= num_tokens
        return StepPlan(tuple(chunks))

    def update(self, plan: StepPlan, token_ids: list[int]) -> list[TokenOutput]:
        """Enter what a step has computed: `token_ids` of its sampled chunks, in order."""
        running = {request.request_id: request for request in self.running}
        outputs = []
        tokens = iter(token_ids)
        for chunk in plan.chunks:
            request = running[chunk.request_id]
            request.num_computed = chunk.end
            if chunk.is_sampled:
                request.output_ids.append(next(tokens))
                reason = request.finish_reason()
                outputs.append(TokenOutput(request.request_id, request.output_ids[-1], reason))
                if reason is not None:
                    self.running.remove(request)
                    self._blocks.release(request)
        return outputs

    def _chunk(self, request: Request, num_tokens: int) -> Chunk:
        start, end = request.num_computed, request.num_computed + num_tokens
        self._blocks.hold(request, end)
        return Chunk(
            request_id=request.request_id,
            token_ids=request.token_ids(start, end),
            start=start,
            block_ids=tuple(request.block_ids),
            is_sampled=end == request.num_tokens,
            sampling=request.sampling,
        )

    def _make_room(self, request: Request, num_tokens: int, planned: set[Request]) -> bool:
        """Whether `request` can hold `num_tokens`, after preempting later requests that are not in this step."""
        while not self._blocks.can_hold(request, num_tokens):
            victims = [other for other in self.running if other is not request and other not in planned]
            if not victims or self.running.index(victims[-1]) < self.running.index(request):
                if len(self.running) > 1:
                    self._preempt(request)
                return False
            self._preempt(victims[-1])
        return True

    def _preempt(self, request: Request) -> None:
        self._blocks.release(request)
        request.num_computed = 0
        self.running.remove(request)
        self.waiting.appendleft(request)
