"""How a token is made: `step`, on one screen. And the thread that makes one after another.

Two crossings between threads: requests and aborts enter through one queue, tokens leave through one router.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

from ts_parallel.engine.request import Request
from ts_parallel.engine.router import TokenRouter
from ts_parallel.engine.scheduler import Scheduler, TokenOutput
from ts_parallel.engine.stats import ABORTED, TIMED_OUT, Figures
from ts_parallel.errors import EngineError
from ts_parallel.step_plan import StepPlan

logger = logging.getLogger(__name__)

# A request may run this many tokens ahead of what its reader has taken: enough that a reader never waits for the
# engine, few enough that a reader who left costs little.
MAX_TOKENS_AHEAD = 64
# A mailbox that nobody has emptied for so long belongs, as far as anybody can know, to a client that is gone.
SECONDS_TO_FORGET = 60.0
# Ranks that follow hear from rank 0 at least this often, well within their patience (`Topology.patience`).
SECONDS_BETWEEN_SIGNS_OF_LIFE = 20.0
_SECONDS_BETWEEN_LOOKS_WHEN_PAUSED = 0.005


class StepRunner(Protocol):
    @property
    def num_stages(self) -> int:
        """How many steps can be at work at once."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Start one step. Every step that has chunks is to be collected, in order."""
        ...

    def collect(self) -> list[int]:
        """Wait for the oldest step that was submitted; its result's numbers (`StepPlan`)."""
        ...


class Engine:
    """Owns the scheduler. Everything here runs in one thread."""

    def __init__(self, runner: StepRunner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._started: deque[float] = deque()  # when each step in flight was
        self._last_result = 0.0
        self._num_done = 0

    @property
    def progress(self) -> int | None:
        """How many steps are done, while another is under way; None while none is. From any thread."""
        return self._num_done if self._started else None

    @property
    def has_requests(self) -> bool:
        """Whether there is anything left to do, be it to collect what nobody wants any more."""
        return bool(self._scheduler.running or self._scheduler.waiting or self._scheduler.num_in_flight)

    def figures(self) -> Figures:
        return self._scheduler.figures()

    def add(self, request: Request) -> None:
        self._scheduler.add(request)

    def abort(self, request_id: str, reason: str = ABORTED) -> None:
        self._scheduler.abort(request_id, reason)

    def step(
        self,
        paused: Collection[str] = (),
        deliver: Callable[[list[TokenOutput]], None] | None = None,
    ) -> bool:
        """Start one step of all requests but the `paused` ones, and deliver the tokens of the oldest one in flight.

        It is waited for once every stage has a step, or where without its tokens nobody could run. False where nobody
        could, and nothing was in flight.
        """
        plan = self._scheduler.schedule(paused)
        if plan.chunks:
            self._started.append(time.perf_counter())
            self._runner.submit(plan)
            if self._scheduler.num_in_flight < self._runner.num_stages:
                return True
        if not self._scheduler.num_in_flight:
            return False
        numbers = self._runner.collect()
        self._num_done += 1
        now = time.perf_counter()
        # With several steps in flight, a step takes the time since the one before it was done.
        outputs = self._scheduler.update(numbers, now - max(self._last_result, self._started.popleft()))
        self._last_result = now
        if deliver is not None:
            deliver(outputs)
        return True

    def sign_of_life(self) -> None:
        self._started.append(time.perf_counter())  # for it may have to wait, as a step may
        self._runner.submit(StepPlan())
        self._started.pop()

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """Run `requests` to their ends, all at once; each one's output token ids.

        Raises:
            EngineError: for one there was no token to choose. The others have run to their ends all the same.
        """
        for request in requests:
            self.add(request)
        while self.has_requests:
            self.step()
        for number, request in enumerate(requests):
            if request.error is not None:
                raise EngineError(
                    f"request {number} of {len(requests)}, after {len(request.output_ids)} tokens: {request.error}"
                )
        return [request.output_ids for request in requests]


class EngineThread:
    """Runs an engine freely in a thread of its own. Owns the queue in and the router out."""

    def __init__(self, engine: Engine, on_failure: Callable[[], None], stream_interval: float = 0.0) -> None:
        """
        Args:
            stream_interval: as of `TokenRouter`.
        """
        self.router = TokenRouter(stream_interval)
        self._engine = engine
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[Request | tuple[str, str]] = queue.SimpleQueue()
        self._companions: dict[str, list[str]] = {}
        self._handing_over = threading.Lock()  # so that none is aborted between its reservation and its requests
        self._last_sign_of_life = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def progress(self) -> int | None:
        """As of `Engine`."""
        return self._engine.progress

    @property
    def num_open(self) -> int:
        """The requests that were submitted and whose mailboxes are not closed."""
        return self.router.num_open

    def figures(self) -> Figures:
        return self._engine.figures()

    def start(self) -> None:
        self._thread.start()

    def reserve(self, request_id: str) -> None:
        """Open the mailbox of a request that is still being prepared, so that it counts as open and can be aborted."""
        self.router.reserve(request_id)

    def submit(
        self,
        request: Request,
        *companions: Request,
        seconds: float | None = None,
        is_reserved: bool = False,
    ) -> bool:
        """Run requests, each with a mailbox of its own; to abort the first is to abort its companions.

        Args:
            seconds: the longest that each may take, waiting included, and what went before since the reservation.
            is_reserved: whether the first has a mailbox already.

        Returns: whether they run; not where one that was reserved was aborted meanwhile.
        """
        with self._handing_over:
            if is_reserved and not self.router.is_open(request.request_id):
                return False
            self._companions[request.request_id] = [companion.request_id for companion in companions]
            for own in (request, *companions):
                self.router.open(own.request_id, seconds, request.request_id)
                self._inbox.put(own)
            return True

    def stop(self, request_id: str) -> None:
        """Let a request's tokens be enough; its mailbox stays."""
        self._inbox.put((request_id, "stop"))

    def abort(self, request_id: str) -> None:
        """End a request, finished or not; its mailbox is gone when this returns."""
        with self._handing_over:
            for own in (request_id, *self._companions.pop(request_id, ())):
                self.router.close(own)
                self._inbox.put((own, ABORTED))

    def _run(self) -> None:
        try:
            while True:
                self._turn()
        except Exception as error:  # whatever it was, no stream may hang for it
            logger.exception("the engine failed")
            self.router.fail_all(f"the engine failed: {type(error).__name__}: {error}")
            self._on_failure()

    def _turn(self) -> None:
        for request_id in self.router.forget(SECONDS_TO_FORGET):
            self._engine.abort(request_id)
        for request_id in self.router.expire():
            self._engine.abort(request_id, TIMED_OUT)
        if not self._engine.has_requests:
            self._receive(SECONDS_BETWEEN_SIGNS_OF_LIFE / 2)
        while self._receive(0):
            pass
        if self._engine.step(self.router.full(MAX_TOKENS_AHEAD), self.router.deliver):
            self._last_sign_of_life = time.monotonic()
            return
        if self._engine.has_requests:
            self._receive(_SECONDS_BETWEEN_LOOKS_WHEN_PAUSED)
        if time.monotonic() - self._last_sign_of_life > SECONDS_BETWEEN_SIGNS_OF_LIFE:
            self._engine.sign_of_life()
            self._last_sign_of_life = time.monotonic()

    def _receive(self, seconds: float) -> bool:
        """Take one request or abort out of the inbox, waiting for it at most `seconds`."""
        try:
            message = self._inbox.get(timeout=seconds) if seconds else self._inbox.get_nowait()
        except queue.Empty:
            return False
        if isinstance(message, Request):
            self._engine.add(message)
        else:
            self._engine.abort(*message)
        return True
