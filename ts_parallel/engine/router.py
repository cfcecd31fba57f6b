"""Tokens on their way out of the engine's thread: one mailbox a request."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from typing import Literal

from ts_parallel.engine.request import FinishReason
from ts_parallel.engine.scheduler import TokenOutput
from ts_parallel.step_plan import TokenLogprobs


@dataclass
class Delivery:
    """What a request has got since its mailbox was last emptied. A stream ends with one `finish_reason` or `error`."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list, kw_only=True)
    """One for each token, where the request wants them."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    fault: Literal["engine", "time", "form"] = "engine"
    """What the error came of: the engine, a time that is over, or the form that its answer was to have."""
    is_told: bool = False
    """Whether whoever prepared the request has something to say of it (`TokenRouter.tell`)."""

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class TokenRouter:
    """Owns the mailboxes. The engine's thread fills them, any other thread empties them."""

    def __init__(self, stream_interval: float = 0.0) -> None:
        """
        Args:
            stream_interval: seconds between two times at which `wait` tells of tokens that continue answers. It tells
                at once of a request's first token and of its end.
        """
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._is_pressing = threading.Condition(lock)
        self._stream_interval = stream_interval
        self._told_at = -math.inf
        self._has_pressing = False
        self._begun: set[str] = set()
        self._mailboxes: dict[str, Delivery] = {}
        self._emptied_at: dict[str, float] = {}
        self._reserved_at: dict[str, float] = {}
        self._limits: dict[str, tuple[float, float]] = {}  # when a request's time is over, and how long it was

    @property
    def num_open(self) -> int:
        return len(self._mailboxes)

    def reserve(self, request_id: str) -> None:
        """Open a mailbox whose request is still to come: it counts, its time runs, and it is not forgotten."""
        with self._changed:
            self._mailboxes[request_id] = Delivery()
            self._reserved_at[request_id] = time.monotonic()

    def is_open(self, request_id: str) -> bool:
        return request_id in self._mailboxes

    def open(self, request_id: str, seconds: float | None = None, beside: str | None = None) -> None:
        """Where it may only take so many `seconds`, `expire` ends it then. They count from its reservation on, or from
        that of the request `beside` it."""
        with self._changed:
            now = time.monotonic()
            self._mailboxes[request_id] = Delivery()
            self._emptied_at[request_id] = now
            if seconds is not None:
                self._limits[request_id] = (self._reserved_at.get(beside or request_id, now) + seconds, seconds)

    def close(self, request_id: str) -> None:
        with self._changed:
            self._mailboxes.pop(request_id, None)
            self._begun.discard(request_id)
            self._emptied_at.pop(request_id, None)
            self._reserved_at.pop(request_id, None)
            self._limits.pop(request_id, None)

    def deliver(self, outputs: list[TokenOutput]) -> None:
        """Tokens for a mailbox that was closed are dropped."""
        with self._changed:
            is_pressing = False
            for output in outputs:
                if (mailbox := self._mailboxes.get(output.request_id)) is not None:
                    if output.token_id is not None:
                        mailbox.token_ids.append(output.token_id)
                    if output.logprobs is not None:
                        mailbox.logprobs.append(output.logprobs)
                    if output.error is None:
                        mailbox.finish_reason = output.finish_reason
                    else:
                        mailbox.error, mailbox.fault = output.error, output.fault
                    if mailbox.is_last:
                        self._limits.pop(output.request_id, None)
                    if mailbox.is_last or output.request_id not in self._begun:
                        self._begun.add(output.request_id)
                        is_pressing = True
            if is_pressing:
                self._press()
            else:
                self._changed.notify_all()

    def tell(self, request_id: str) -> None:
        """Have a mailbox looked at, where it is still open."""
        with self._changed:
            if (mailbox := self._mailboxes.get(request_id)) is not None:
                mailbox.is_told = True
                self._press()

    def expire(self) -> list[str]:
        """Fail the requests whose time is over, each once; which those are."""
        with self._changed:
            now = time.monotonic()
            expired = [name for name, (deadline, _) in self._limits.items() if deadline <= now]
            for name in expired:
                _, seconds = self._limits.pop(name)
                mailbox = self._mailboxes[name]
                mailbox.error, mailbox.fault = f"the request took longer than its {seconds:g} s", "time"
            if expired:
                self._press()
            return expired

    def fail_all(self, error: str) -> None:
        with self._changed:
            for mailbox in self._mailboxes.values():
                if not mailbox.is_last:
                    mailbox.error = error
            self._press()

    def take(self, request_id: str) -> Delivery:
        """Empty a mailbox."""
        with self._changed:
            mailbox = self._mailboxes[request_id]
            self._mailboxes[request_id] = Delivery()
            if request_id in self._emptied_at:
                self._emptied_at[request_id] = time.monotonic()
            return mailbox

    def wait(self, seconds: float) -> bool:
        """Whether it is time to empty the mailboxes, at the latest after `seconds`: one holds something, and the tokens
        in it begin or end an answer, or nothing was told of for `stream_interval`. Whoever waits in vain reads none the
        less: a prompt may take minutes before there is anything."""
        with self._changed:
            quiet = self._told_at + self._stream_interval - time.monotonic()
            if quiet > 0 and not self._is_pressing.wait_for(lambda: self._has_pressing, min(quiet, seconds)):
                if quiet >= seconds:
                    self._note_reader()
                    return False
                seconds -= quiet
            has_mail = self._changed.wait_for(self._has_mail, seconds)
            if has_mail:
                self._told_at, self._has_pressing = time.monotonic(), False
            else:
                self._note_reader()
            return has_mail

    def full(self, num_tokens: int) -> set[str]:
        """The requests with at least `num_tokens` tokens waiting to be taken."""
        with self._changed:
            return {name for name, mailbox in self._mailboxes.items() if len(mailbox.token_ids) >= num_tokens}

    def forget(self, seconds: float) -> list[str]:
        """Fail the requests whose mailbox nobody has emptied or waited for in `seconds`, each once; which those are.

        Their mailboxes stay: one whose reader comes back after all holds an error then, and is not missing.
        """
        with self._changed:
            limit = time.monotonic() - seconds
            forgotten = [name for name, emptied_at in self._emptied_at.items() if emptied_at < limit]
            for name in forgotten:
                del self._emptied_at[name]
                self._limits.pop(name, None)
                mailbox = self._mailboxes[name]
                if not mailbox.is_last:
                    mailbox.error, mailbox.fault = f"nobody has read the answer for {seconds:g} s", "time"
            if forgotten:
                self._press()
            return forgotten

    def _note_reader(self) -> None:
        now = time.monotonic()
        for name in self._emptied_at:
            self._emptied_at[name] = now

    def _press(self) -> None:
        """Wake also who waits out the interval, which nothing else does: it takes the interpreter from the engine."""
        self._has_pressing = True
        self._is_pressing.notify_all()
        self._changed.notify_all()

    def _has_mail(self) -> bool:
        return any(own.token_ids or own.is_last or own.is_told for own in self._mailboxes.values())
