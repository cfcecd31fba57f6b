"""Items become micro-batches and results again: in order, each for itself, at the same time, and never for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from ts_parallel.partition.program import Crossing
from ts_parallel.runtime.batch.batch_runner import BatchRunner
from ts_parallel.runtime.channel import StepChannel
from ts_parallel.serving.batch.micro_batching import Collator, MicroBatcher
from ts_parallel.topology import Topology, open_topology

Inputs = Mapping[str, torch.Tensor]
PADDING = Collator({"ids": 99, "mask": 0})
PATIENCE = 20.0


class MaskedSum:
    """A whole model in one stage: the sum of the ids that the mask leaves, `[B, 1]`. Counts its micro-batches."""

    inputs = ("ids", "mask")
    received: Sequence[Crossing] = ()
    sent = (Crossing("sum", torch.int64, ("ids[0]", 1)),)

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, step: None, inputs: Inputs, received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.shapes.append(tuple(inputs["ids"].shape))
        if bool((inputs["ids"] == 13).any()):
            raise ArithmeticError("thirteen")
        return [(inputs["ids"] * inputs["mask"]).sum(dim=1, keepdim=True)]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    topology = open_topology(1, "cpu", {}, num_threads=1)
    yield topology
    topology.close()


class Bench:
    """A micro-batcher of four items a micro-batch over a real runner."""

    def __init__(self, topology: Topology) -> None:
        self.stage = MaskedSum()
        self._runner = BatchRunner(
            [self.stage], StepChannel(topology), topology, [self.stage.inputs], self.stage.sent[0]
        )
        self._batchers: list[MicroBatcher] = []

    def run(
        self,
        items: Sequence[Any],
        preprocess: Callable[[Any], Inputs] | None = None,
        postprocess: Callable[[torch.Tensor], Any] = lambda row: int(row),
        threads: int = 1,
        collator: Collator = PADDING,
    ) -> list[Any]:
        batcher = MicroBatcher(
            self._runner, preprocess or ids_of, lambda _, row: postprocess(row), 4, threads, threads, collator
        )
        self._batchers.append(batcher)
        return batcher.run(items)

    def close(self) -> None:
        for batcher in self._batchers:
            batcher.close()


@pytest.fixture
def bench(topology: Topology) -> Iterator[Bench]:
    bench = Bench(topology)
    yield bench
    bench.close()


def ids_of(item: Sequence[int]) -> Inputs:
    return {"ids": torch.tensor(item), "mask": torch.ones(len(item), dtype=torch.int64)}


def refuse(item: Any) -> Inputs:
    raise LookupError(item)


def test_results_come_in_the_order_of_the_items(bench: Bench) -> None:
    """Whichever of them is ready first."""

    def slower_for_earlier_ones(item: Sequence[int]) -> Inputs:
        time.sleep(0.02 if item[0] % 2 else 0.0)
        return ids_of(item)

    items = [[number, 100] for number in range(1, 11)]
    assert bench.run(items, slower_for_earlier_ones, threads=3) == [101 + index for index in range(10)]
    assert bench.stage.shapes == [(4, 2), (4, 2), (2, 2)]


def test_shorter_items_are_filled_up_to_the_longest_of_their_micro_batch(bench: Bench) -> None:
    items = [[1], [1, 2, 3], [2, 2], [5], [7], [8, 1]]
    assert bench.run(items) == [sum(item) for item in items]
    assert bench.stage.shapes == [(4, 3), (2, 2)]


def test_no_item_means_no_inference(bench: Bench) -> None:
    assert bench.run([]) == []
    assert bench.stage.shapes == []


def test_item_that_cannot_be_preprocessed_is_left_out(bench: Bench) -> None:
    """The others move up, so that micro-batches are full all the same."""

    def refusing(item: Sequence[int]) -> Inputs:
        return refuse(item) if item[0] % 3 == 0 else ids_of(item)

    results = bench.run([[number] for number in range(1, 8)], refusing)
    assert [result for result in results if isinstance(result, int)] == [1, 2, 4, 5, 7]
    assert [type(result) for result in results if not isinstance(result, int)] == [LookupError, LookupError]
    assert [type(results[index]) for index in (2, 5)] == [LookupError, LookupError]
    assert bench.stage.shapes == [(4, 1), (1, 1)]


def test_items_that_are_all_bad_are_all_refused_without_inference(bench: Bench) -> None:
    results = bench.run([None, None], refuse)
    assert [type(result) for result in results] == [LookupError, LookupError]
    assert bench.stage.shapes == []


def test_last_item_is_bad_and_the_others_are_not_forgotten(bench: Bench) -> None:
    *results, last = bench.run([[1], [2], [3]], lambda item: refuse(item) if item == [3] else ids_of(item))
    assert results == [1, 2]
    assert isinstance(last, LookupError)


def test_item_that_cannot_be_postprocessed_is_alone_in_it(bench: Bench) -> None:
    def refusing(row: torch.Tensor) -> int:
        return 12 // int(row)

    first, second, third = bench.run([[4], [0], [6]], postprocess=refusing)
    assert (first, third) == (3, 2)
    assert isinstance(second, ZeroDivisionError)


def test_items_that_do_not_go_together_run_alone(bench: Bench) -> None:
    """Without padding, items of several lengths cannot be joined."""
    assert bench.run([[1, 2], [3]], collator=Collator()) == [3, 3]
    assert bench.stage.shapes == [(1, 2), (1, 1)]


def test_part_of_the_output_that_belongs_to_padding_is_cut_off() -> None:
    collator = Collator({"ids": 0}, trims_by="ids")
    items = [{"ids": torch.arange(2)}, {"ids": torch.arange(4)}]
    assert collator.join(items)["ids"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert [list(row.shape) for row in collator.split(torch.zeros(2, 4, 3), items)] == [[2, 3], [4, 3]]


def test_only_the_first_dim_is_filled_up() -> None:
    joined = Collator({"frames": -1}).join([{"frames": torch.zeros(1, 2)}, {"frames": torch.ones(2, 2)}])
    assert joined["frames"].tolist() == [[[0, 0], [-1, -1]], [[1, 1], [1, 1]]]


def test_first_items_are_done_while_later_ones_are_preprocessed(bench: Bench) -> None:
    """The last item is preprocessed only once the first one's result is there."""
    has_result = threading.Event()

    def preprocess(item: Sequence[int]) -> Inputs:
        if item == [9]:
            assert has_result.wait(PATIENCE)
        return ids_of(item)

    def postprocess(row: torch.Tensor) -> int:
        if int(row) == 0:
            has_result.set()
        return int(row)

    assert bench.run([[number] for number in range(10)], preprocess, postprocess) == list(range(10))


def test_postprocessing_goes_on_beside_later_inference(bench: Bench) -> None:
    """The first item's postprocessing ends only once the last micro-batch has been computed."""

    def postprocess(row: torch.Tensor) -> int:
        deadline = time.monotonic() + PATIENCE
        while len(bench.stage.shapes) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        return len(bench.stage.shapes)

    assert bench.run([[number] for number in range(9)], postprocess=postprocess) == [3] * 9


def test_as_many_threads_work_as_were_asked_for(bench: Bench) -> None:
    before, after = threading.Barrier(3), threading.Barrier(3)

    def preprocess(item: Sequence[int]) -> Inputs:
        before.wait(PATIENCE)
        return ids_of(item)

    def postprocess(row: torch.Tensor) -> int:
        after.wait(PATIENCE)
        return int(row)

    assert bench.run([[number] for number in range(6)], preprocess, postprocess, threads=3) == list(range(6))


@pytest.mark.parametrize("position", [0, 5, 11])
def test_inference_that_fails_is_raised_and_nobody_waits(bench: Bench, position: int) -> None:
    items = [[number + 20] for number in range(12)]
    items[position] = [13]
    with pytest.raises(ArithmeticError, match="thirteen"):
        bench.run(items, threads=2)
    assert bench.run([[1], [2]]) == [1, 2]  # and the next call is as if nothing had been


def test_missing_input_is_named(bench: Bench) -> None:
    with pytest.raises(ValueError, match=r"\['mask'\] is missing"):
        bench.run([[1]], lambda item: {"ids": torch.tensor(item)})


def test_items_of_one_shape_come_together_where_none_is_padded(bench: Bench) -> None:
    """However they follow one another; what is left of each shape goes last."""
    items = [[1, 2], [3], [4, 5], [6], [7, 8], [9, 1], [2]]
    assert bench.run(items, collator=Collator()) == [sum(item) for item in items]
    assert bench.stage.shapes == [(4, 2), (3, 1)]
