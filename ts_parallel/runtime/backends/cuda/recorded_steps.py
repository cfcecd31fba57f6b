"""Steps of the sizes that `step_numbers` fills up to, recorded once and replayed: a launch, not hundreds, for each.

Everything that a recorded step reads lies where it lay: the step's numbers, the weights, the KV memory, and what was
received from the stage before, which is copied to its place. What asks the device for an answer, or depends on the
sequences' lengths, cannot be recorded: then steps run as they do without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ts_parallel.partition.program import POSITIONS, ROWS, TOKEN_IDS, Crossing
from ts_parallel.runtime.backends.base import StepFunction
from ts_parallel.runtime.backends.cuda.attention import CudaAttention
from ts_parallel.runtime.backends.cuda.step_numbers import StepNumbers

logger = logging.getLogger(__name__)

Outputs: TypeAlias = list[torch.Tensor]
Recorder: TypeAlias = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]
"""Runs a function once, recording it → what replays it, and the tensors that are its outputs each time."""

_WARM_UPS = 2  # in the first of which kernels are compiled


@dataclass(frozen=True)
class _Recording:
    replay: Callable[[], None]
    received: tuple[torch.Tensor, ...]
    outputs: Outputs


class RecordedSteps:
    """A stage, as `StepFunction`. Owns the recordings, and the memory of what they receive and give."""

    def __init__(
        self,
        stage: StepFunction,
        attention: CudaAttention,
        recorder: Recorder,
        sizes: Sequence[int],
        *,
        is_sent_on: bool,
    ) -> None:
        """
        Args:
            sizes: those of the steps to be recorded.
            is_sent_on: whether its outputs are still read while the next step is under way.
        """
        self.received = stage.received
        self._stage = stage
        self._is_sent_on = is_sent_on
        self._recordings: dict[int, _Recording] = {}
        try:
            for size in sorted(sizes, reverse=True):  # the smaller find room in what the larger had
                self._recordings[size] = self._record(size, attention, recorder)
        except Exception as error:
            logger.warning("steps are not recorded, so each operation is launched by itself: %s", error)
            self._recordings.clear()

    @property
    def sizes(self) -> frozenset[int]:
        """Of the steps that were recorded."""
        return frozenset(self._recordings)

    @torch.inference_mode()
    def _record(self, size: int, attention: CudaAttention, recorder: Recorder) -> _Recording:
        step = attention.filling(size)
        inputs = {TOKEN_IDS: step.token_ids, POSITIONS: step.positions, ROWS: step.sampled_rows}
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        received = tuple(_memory(crossing, shapes, step.slots.device) for crossing in self.received)
        for _ in range(_WARM_UPS):
            self._stage(step, inputs, received)
        replay, outputs = recorder(lambda: self._stage(step, inputs, received))
        return _Recording(replay, received, outputs)

    def __call__(
        self, step: StepNumbers, inputs: Mapping[str, torch.Tensor], received: Sequence[torch.Tensor] = ()
    ) -> Outputs:
        """What goes to the next stage; on the last one, the model's outputs."""
        recording = None if step.size is None else self._recordings.get(step.size)
        if recording is None:
            return self._stage(step, inputs, received)
        for target, source in zip(recording.received, received, strict=True):
            target.copy_(source)
        recording.replay()
        return [output.clone() for output in recording.outputs] if self._is_sent_on else recording.outputs


def _memory(crossing: Crossing, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> torch.Tensor:
    return torch.zeros(crossing.shape(shapes), dtype=crossing.dtype, device=device)


class GraphRecorder:
    """Records CUDA graphs. Owns the memory that they share."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs
