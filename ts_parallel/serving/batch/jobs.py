"""One request as the items that it brings, and the one answer that is made of what they come to.

A list of texts is so many items of micro-batches, which may share one with those of other requests. What is wrong with
one of them is the answer to the whole request, and says which. Knows no task and no transport.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ts_parallel.config import did_you_mean
from ts_parallel.errors import EngineError, RequestError
from ts_parallel.serving.exchange import JSON, RawRequest, echo

logger = logging.getLogger(__name__)

Inputs = Mapping[str, torch.Tensor]
MOST_ITEMS = 2048
"""Of one request, where nothing else is said."""


@dataclass(frozen=True)
class Done:
    """An item that has been through the model."""

    inputs: Inputs
    output: Any


@dataclass(frozen=True)
class Body:
    """An answer that is no JSON."""

    text: str
    content_type: str = JSON


@dataclass(frozen=True)
class Work:
    """What a request asks for."""

    items: Sequence[Callable[[], Inputs]]
    """Each makes an item's model inputs, in a thread of preprocessing; what it raises refuses the request."""
    finish: Callable[[Sequence[Done]], Any]
    """What `json.dumps` takes, or a `Body`, of all items in their order; in a thread of postprocessing."""
    name_of: Callable[[int], str] = "input[{}]".format
    """What the request calls an item, where there are several."""


class Job:
    """Owns what one request has come to. Called from the threads of pre- and postprocessing at once."""

    def __init__(self, work: Work, respond: Callable[[Any], None]) -> None:
        """
        Args:
            respond: told the answer once all items are there.
        """
        self._work = work
        self._respond = respond
        self._done: list[Done | None] = [None] * len(work.items)
        self._num_left = len(work.items)
        self._failed: tuple[int, Exception] | None = None
        self._lock = threading.Lock()
        self.parts = [Part(self, index) for index in range(len(work.items))]

    def prepare(self, index: int) -> Inputs:
        """
        Raises:
            Exception: what is wrong with the item, or that an earlier one has failed.
        """
        failed = self._failed
        if failed is not None and failed[0] < index:
            raise failed[1]
        try:
            return self._work.items[index]()
        except Exception as error:
            self._fail(index, error)
            raise

    def take(self, index: int, inputs: Inputs, output: Any) -> None:
        """The model's output for an item; with the last one the request is answered."""
        with self._lock:
            self._done[index] = Done(inputs, output)
            self._num_left -= 1
            if self._num_left:
                return
        self._respond(self._work.finish([done for done in self._done if done is not None]))

    def error_of(self, outcomes: Sequence[Any]) -> RequestError | None:
        """What refuses the request, of what has become of its items; None where it is answered."""
        index, error = next(((at, own) for at, own in enumerate(outcomes) if isinstance(own, Exception)), (0, None))
        if self._failed is not None:
            index, error = self._failed
        if error is None:
            return None
        if self._failed is None or len(self.parts) == 1:
            return as_request_error(error)
        named = copy.copy(as_request_error(error))
        named.args = (f"{self._work.name_of(index)}: {named}",)
        return named

    def _fail(self, index: int, error: Exception) -> None:
        with self._lock:
            if self._failed is None or index < self._failed[0]:
                self._failed = index, error


class Part:
    """An item of a job, as the micro-batcher sees it."""

    def __init__(self, job: Job, index: int) -> None:
        self.job = job
        self._index = index
        self._inputs: Inputs = {}

    def prepare(self) -> Inputs:
        self._inputs = self.job.prepare(self._index)
        return self._inputs

    def take(self, output: Any) -> None:
        self.job.take(self._index, self._inputs, output)


def as_request_error(error: Exception) -> RequestError:
    """What the client is told of an exception."""
    if isinstance(error, RequestError):
        return error
    logger.error("a request failed", exc_info=error)
    return EngineError(f"{type(error).__name__}: {error}")


def known_fields(item: RawRequest, names: Sequence[str]) -> dict[str, Any]:
    """The JSON body's fields; one that is null is as if it were not there.

    Raises:
        RequestError: there is a field of another name.
    """
    return known_names({name: value for name, value in item.fields().items() if value is not None}, names)


def known_names(fields: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The same fields.

    Raises:
        RequestError: there is one of another name.
    """
    for unknown in fields.keys() - set(names):
        raise RequestError(f"unknown field {unknown!r}{did_you_mean(unknown, dict.fromkeys(names))}", str(unknown))
    return fields


def choice(fields: Mapping[str, Any], name: str, among: Sequence[Any]) -> Any:
    """The value of a field that has one of a few, the first of them where it is not there.

    Raises:
        RequestError: it has another.
    """
    value = fields.get(name, among[0])
    if not any(value == own and type(value) is type(own) for own in among):
        raise RequestError(f"{name!r} must be one of {list(among)}, got {echo(value)}", name)
    return value


def count_field(fields: Mapping[str, Any], name: str, most: int | None = None, least: int = 1) -> int | None:
    """A field's whole number; None where it is not there.

    Raises:
        RequestError: it is none, or out of its limits.
    """
    value = fields.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        limits = f"from {least}" + (f" to {most}" if most is not None else "")
        raise RequestError(f"{name!r} must be a number {limits}, got {echo(value)}", name)
    return value


def within_most(values: Sequence[Any], name: str, most: int) -> None:
    """
    Raises:
        RequestError: there are none, or too many.
    """
    if not values:
        raise RequestError(f"{name!r} is empty", name)
    if len(values) > most:
        raise RequestError(
            f"{name!r} has {len(values)} items, one request takes at most {most}: send several, or raise max_items "
            "(handler key)",
            name,
        )
