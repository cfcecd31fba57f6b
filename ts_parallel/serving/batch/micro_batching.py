"""Many items through one model: preprocessing, micro-batches and postprocessing, each while the others run.

Inference happens in the caller's thread, which reads the runner like any iterator; only pre- and postprocessing have
threads of their own, and these hand nothing on but futures. So an error ends where it happened, and nobody waits for
what will not come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

Inputs = Mapping[str, torch.Tensor]


class Runner(Protocol):
    """What the micro-batcher needs of `runtime.batch.batch_runner.BatchRunner`."""

    def run(self, batches: Iterable[Inputs]) -> Generator[Any, None, None]:
        """What each micro-batch comes to, which the collator takes apart: most often a tensor, a row an item."""
        ...


@dataclass(frozen=True)
class Collator:
    """How items become one micro-batch and its output the items' again."""

    padding: Mapping[str, int | float] | None = None
    """Name of each input whose first dim differs from item to item → what the shorter ones are filled up with, behind
    what they have; None: only items of one shape come together."""
    trims_by: str | None = None
    """The input whose length an item's part of the output has too; None: outputs have no such dim."""

    def kind(self, inputs: Inputs) -> object:
        """Items of one kind can be joined."""
        return tuple(tensor.shape for tensor in inputs.values()) if self.padding is None else None

    def join(self, items: Sequence[Inputs]) -> dict[str, torch.Tensor]:
        """`[*shape]` of each item → `[B, *longest]`.

        Raises:
            RuntimeError: the shapes do not go together.
        """
        return {name: torch.stack(self._padded(name, [item[name] for item in items])) for name in items[0]}

    def split(self, output: Any, items: Sequence[Inputs]) -> list[Any]:
        """The output's row of each item, without what belongs to the padding."""
        rows = list(output)
        if self.trims_by is None:
            return rows
        return [row[: len(item[self.trims_by])] for row, item in zip(rows, items, strict=True)]

    def _padded(self, name: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.padding is None or name not in self.padding:
            return tensors
        longest = max(len(tensor) for tensor in tensors)
        fill = self.padding[name]
        # Of pad's pairs, the last dim's comes first: all but the first dim stay as they are.
        return [F.pad(t, (*[0, 0] * (t.dim() - 1), 0, longest - len(t)), value=fill) for t in tensors]


class MicroBatcher:
    """Owns the worker threads. `run` is called by one thread at a time."""

    def __init__(
        self,
        runner: Runner,
        preprocess: Callable[[Any], Inputs],
        postprocess: Callable[[Any, torch.Tensor], Any],
        micro_batch_size: int,
        preprocess_threads: int = 1,
        postprocess_threads: int = 1,
        collator: Collator | None = None,
    ) -> None:
        """
        Args:
            preprocess: an item → its model inputs, without the dim of the batch; in several threads at once.
            postprocess: an item and its part of the output, on the CPU → its result; in several threads at once.
        """
        self._runner = runner
        self._preprocess = preprocess
        self._postprocess = postprocess
        self._micro_batch_size = micro_batch_size
        self._collator = collator or Collator()
        self._preprocessing = ThreadPoolExecutor(preprocess_threads, "preprocess")
        self._postprocessing = ThreadPoolExecutor(postprocess_threads, "postprocess")

    def run(self, items: Sequence[Any]) -> list[Any | Exception]:
        """Each item's result, in the order of the items; where preprocessing, joining or postprocessing failed for an
        item, that exception, and nothing happens to the others.

        Raises:
            Exception: whatever the inference failed with; no item has a result then.
        """
        prepared = [self._preprocessing.submit(self._preprocess, item) for item in items]
        results: dict[int, Exception] = {}
        ends: dict[int, Future[Any]] = {}
        members: deque[list[tuple[int, Inputs]]] = deque()
        try:
            with closing(self._runner.run(self._micro_batches(prepared, members, results))) as outputs:
                for output in outputs:
                    indices, inputs = zip(*members.popleft(), strict=True)
                    for index, row in zip(indices, self._collator.split(output, inputs), strict=True):
                        ends[index] = self._postprocessing.submit(self._postprocess, items[index], row)
        except BaseException:
            for future in (*prepared, *ends.values()):
                future.cancel()
            raise
        return [results[index] if index in results else _outcome(ends[index]) for index in range(len(items))]

    def close(self) -> None:
        """End the threads, once they have done what they are doing."""
        self._preprocessing.shutdown(cancel_futures=True)
        self._postprocessing.shutdown(cancel_futures=True)

    def _micro_batches(
        self,
        prepared: Sequence[Future[Inputs]],
        members: deque[list[tuple[int, Inputs]]],
        failures: dict[int, Exception],
    ) -> Iterator[Inputs]:
        """Joined micro-batches, of items of one kind in their order, each once its last item is ready. Which items they
        are of goes to `members`, what is wrong with an item to `failures`."""
        waiting: dict[object, list[tuple[int, Inputs]]] = {}
        for index, future in enumerate(prepared):
            inputs = _outcome(future)
            if isinstance(inputs, Exception):
                failures[index] = inputs
                continue
            kind = self._collator.kind(inputs)
            waiting.setdefault(kind, []).append((index, inputs))
            if len(waiting[kind]) == self._micro_batch_size:
                yield from self._joined(waiting.pop(kind), members, failures)
        for rest in waiting.values():
            yield from self._joined(rest, members, failures)

    def _joined(
        self,
        batch: list[tuple[int, Inputs]],
        members: deque[list[tuple[int, Inputs]]],
        failures: dict[int, Exception],
    ) -> Iterator[Inputs]:
        """The micro-batch; where its items do not go together, each of them alone."""
        try:
            joined = self._collator.join([inputs for _, inputs in batch])
        except Exception as error:
            if len(batch) == 1:
                failures[batch[0][0]] = error
                return
            for one in batch:
                yield from self._joined([one], members, failures)
            return
        members.append(batch)
        yield joined


def _outcome(future: Future[Any]) -> Any:
    """What a future has come to: its result, or the exception that it ended with."""
    try:
        return future.result()
    except Exception as error:
        return error
