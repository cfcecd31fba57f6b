"""Tokens on their way out of the engine's thread: one mailbox a request."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Literal

from ts_parallel.engine.request import FinishReason
from ts_parallel.engine.scheduler import TokenOutput
from ts_parallel.runtime.step import TokenLogprobs


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

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class TokenRouter:
    """Owns the mailboxes. The engine's thread fills them, any other thread empties them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._mailboxes: dict[str, Delivery] = {}
        self._emptied_at: dict[str, float] = {}
        self._limits: dict[str, tuple[float, float]] = {}  # when a request's time is over, and how long it was

    @property
    def num_open(self) -> int:
        return len(self._mailboxes)

    def open(self, request_id: str, seconds: float | None = None) -> None:
        """Where it may only take so many `seconds`, `expire` ends it then."""
        with self._changed:
            self._mailboxes[request_id] = Delivery()
            self._emptied_at[request_id] = time.monotonic()
            if seconds is not None:
                self._limits[request_id] = (time.monotonic() + seconds, seconds)

    def close(self, request_id: str) -> None:
        with self._changed:
            self._mailboxes.pop(request_id, None)
            self._emptied_at.pop(request_id, None)
            self._limits.pop(request_id, None)

    def deliver(self, outputs: list[TokenOutput]) -> None:
        """Tokens for a mailbox that was closed are dropped."""
        with self._changed:
            for output in outputs:
                if (mailbox := self._mailboxes.get(output.request_id)) is not None:
                    mailbox.token_ids.append(output.token_id)
                    if output.logprobs is not None:
                        mailbox.logprobs.append(output.logprobs)
                    if output.error is None:
                        mailbox.finish_reason = output.finish_reason
                    else:
                        mailbox.error, mailbox.fault = output.error, "form"
                    if mailbox.is_last:
                        self._limits.pop(output.request_id, None)
            self._changed.notify_all()

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
                self._changed.notify_all()
            return expired

    def fail_all(self, error: str) -> None:
        with self._changed:
            for mailbox in self._mailboxes.values():
                if not mailbox.is_last:
                    mailbox.error = error
            self._changed.notify_all()

    def take(self, request_id: str) -> Delivery:
        """Empty a mailbox."""
        with self._changed:
            mailbox = self._mailboxes[request_id]
            self._mailboxes[request_id] = Delivery()
            self._emptied_at[request_id] = time.monotonic()
            return mailbox

    def wait(self, seconds: float) -> bool:
        """Whether any mailbox holds something, at the latest after `seconds`."""
        with self._changed:
            return self._changed.wait_for(self._has_mail, seconds)

    def full(self, num_tokens: int) -> set[str]:
        """The requests with at least `num_tokens` tokens waiting to be taken."""
        with self._changed:
            return {name for name, mailbox in self._mailboxes.items() if len(mailbox.token_ids) >= num_tokens}

    def forget(self, seconds: float) -> list[str]:
        """Fail the requests whose mailbox nobody has emptied for `seconds`, each once; which those are.

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
                self._changed.notify_all()
            return forgotten

    def _has_mail(self) -> bool:
        return any(mailbox.token_ids or mailbox.is_last for mailbox in self._mailboxes.values())
