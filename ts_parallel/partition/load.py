"""A rank's program → its weights in memory. How a weight reaches its device: `load_program`.

program → memory for this rank's parameters → their bytes, in the order of the file → each in the form that runs best.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ts_parallel.checkpoint.index import CheckpointIndex
from ts_parallel.checkpoint.load import LoadItem, Slice, load_tensors, refuse_nan
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.partition.program import RankProgram, Source, Sources, TensorParallelPlan
from ts_parallel.topology import TensorParallelGroup


@dataclass(frozen=True)
class RankModel:
    """One rank's part of a model, loaded."""

    program: RankProgram
    tensors: dict[str, torch.Tensor] = field(repr=False)
    """Its parameters and buffers under all their names."""
    seconds: float
    """What reading its weights took."""
    model: nn.Module | None = None
    """The model itself, where its own modules are to run instead of the program's stages."""


def load_program(
    program: RankProgram,
    index: CheckpointIndex,
    group: TensorParallelGroup,
    device: torch.device,
    pack: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
    merge: Callable[[LoadItem], None] = lambda item: None,
) -> RankModel:
    """Give this rank's parameters their memory and fill it.

    Args:
        index: of the checkpoint, or of another with the same tensors.
        merge: told of each item once it was read; may change what was read, as an adapter does.
        pack: what a weight that linears alone read is replaced by, as soon as it was read: so no more than one of them
            is there twice.

    Raises:
        CheckpointError: a file is cut off, or cannot be read, or holds NaN.
    """
    started = time.perf_counter()
    plan, packable = program.plan, program.packable()
    local = {
        name: torch.empty(entry.local_shape(group.rank), dtype=entry.dtype, device=device)
        for name, entry in plan.parameters.items()
    }
    sources = {
        name: tuple(replace(source, stored=index[source.stored.name]) for source in program.sources[name])
        for name in plan.parameters
    }
    items = load_items(local, plan, sources, group.rank)
    waiting = Counter(item.name for item in items)
    progress = Progress(f"loading rank {group.rank} of {group.size}", is_shown=group.rank == 0)

    def finish(item: LoadItem) -> None:
        refuse_nan(item)
        merge(item)
        waiting[item.name] -= 1
        if waiting[item.name] == 0 and item.name in packable:
            local[item.name] = pack(local[item.name])

    load_tensors(_handed_over(items), progress, finish)
    tensors = {alias: local[name] for name, entry in plan.parameters.items() for alias in (name, *entry.aliases)}
    tensors |= {name: buffer.to(device) for name, buffer in program.buffers.items()}
    return RankModel(program, tensors, time.perf_counter() - started)


def _handed_over(items: list[LoadItem]) -> Iterator[LoadItem]:
    """All of them, and nothing keeps their memory any more."""
    while items:
        yield items.pop()


def load_items(
    tensors: Mapping[str, torch.Tensor], plan: TensorParallelPlan, sources: Sources, rank: int
) -> list[LoadItem]:
    """What is to be read so that `tensors`, the parameters of `rank` by name, hold its part of `sources`."""
    return [
        item
        for name, entry in plan.parameters.items()
        for source in sources[name]
        for item in _item(name, tensors[name].detach(), entry.slices[rank] if entry.slices else None, source)
    ]


def _item(name: str, local: torch.Tensor, kept: Slice | None, source: Source) -> Iterator[LoadItem]:
    """The part of `local` that `source` fills, a contiguous view; none where the rank keeps nothing of it."""
    view, cut = local, None
    num_stacked = len(source.corner) - len(source.stored.shape)
    for dim, (start, length) in enumerate(source.box):
        if kept is None or dim != kept.dim:
            view = view.narrow(dim, start, length)
            continue
        assert dim >= num_stacked  # our plans cut inside each expert, never between experts
        first, cut = _overlap(kept, start, start + length, dim - num_stacked)
        if cut.length == 0:
            return
        view = view.narrow(dim, first, cut.length)
    for _ in range(num_stacked):
        view = view[0]
    yield LoadItem(view, source.stored, cut, name)


def _overlap(kept: Slice, begin: int, end: int, dim: int) -> tuple[int, Slice]:
    """What of `kept` lies in `[begin, end)`: where it starts among the kept rows, and its pieces counted from `begin`.

    Pieces follow each other in the order of the dim, so those inside the box are neighbours in the rank's part too.
    """
    pieces: list[tuple[int, int]] = []
    first, done = 0, 0
    for start, length in kept.pieces:
        low, high = max(start, begin), min(start + length, end)
        if low < high:
            if not pieces:
                first = done + low - start
            pieces.append((low - begin, high - low))
        done += length
    return first, Slice(dim, tuple(pieces))
