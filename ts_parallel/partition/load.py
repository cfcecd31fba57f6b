"""A rank's program → its weights in memory. How a weight reaches its device: `load_program`.

program → memory for this rank's parameters → their bytes, in the order of the file → each in the form that runs best.
A weight that is laid out in panels gets there a few rows at a time, so it is nowhere in memory as the file has it: nor
in full precision, where its numbers become small integers on the way. Those that are stored as such integers stay the
integers that they are.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from ts_parallel.checkpoint.codes.integers import RowIntegers, row_integers_of
from ts_parallel.checkpoint.index import CheckpointIndex
from ts_parallel.checkpoint.load import IntegerItem, LoadItem, RowItem, load_tensors, refuse_nan, refuse_nan_in
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.stored import Slice
from ts_parallel.errors import CheckpointError
from ts_parallel.huge_pages import make_tensor
from ts_parallel.partition.program import RankProgram, Source, Sources, TensorParallelPlan
from ts_parallel.topology import TensorParallelGroup

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 1.0  # of a load
_BITS = {"int8": 8, "int4": 4}


class PackedRows(Protocol):
    """A linear's weight `[O, I]` that lies otherwise than the checkpoint has it, in panels of its rows."""

    @property
    def nbytes(self) -> int: ...

    def put(self, first: int, rows: torch.Tensor, /) -> bool:
        """Lay down `rows` `[N, I]`, whole panels of them, or the last ones, from row `first` on; whether one is NaN."""
        ...

    def put_integers(self, first: int, integers: torch.Tensor, scales: torch.Tensor, /) -> bool:
        """The same of rows that are int8 `integers` `[N, I]` times `scales` `[N, G]`, of a weight that becomes
        integers. Nothing is laid down where they are not what it could be: then it returns False."""
        ...


class WeightLayout(Protocol):
    """How weights that linears alone read are to lie: a backend's."""

    rows_of_panel: int

    def takes(self, weight: torch.Tensor, /) -> bool:
        """Whether this one can."""
        ...

    def allocate(
        self, shape: tuple[int, int], dtype: torch.dtype, quantization: str | None, group: int | None = None, /
    ) -> PackedRows:
        """Memory for one of `shape` (O, I), whose numbers become small integers where there is a `quantization`. Each
        `group` of a row's inputs shares a scale; None: as many as suit it."""
        ...


@dataclass(frozen=True)
class RankModel:
    """One rank's part of a model, loaded."""

    program: RankProgram
    tensors: dict[str, Any] = field(repr=False)
    """Its parameters and buffers under all their names; a linear's weight may be `PackedRows`."""
    seconds: float
    """What reading its weights took."""
    model: nn.Module | None = None
    """The model itself, where its own modules are to run instead of the program's stages."""

    @property
    def num_bytes(self) -> int:
        """Of its parameters, as they lie in memory."""
        own = [self.tensors[name] for name in self.program.plan.parameters if name in self.tensors]
        return sum(int(tensor.nbytes) for tensor in own)


def load_program(
    program: RankProgram,
    index: CheckpointIndex,
    group: TensorParallelGroup,
    device: torch.device,
    layout: WeightLayout | None = None,
    merge: Callable[[LoadItem], None] | None = None,
    quantization: str | None = None,
    stage: int = 0,
) -> RankModel:
    """Give this rank's parameters their memory and fill it.

    Args:
        index: of the checkpoint, or of another with the same tensors.
        layout: how weights that linears alone read are to lie; None: as the checkpoint has them.
        merge: told of each item once it was read; may change what was read, as an adapter does. With it a weight that
            is packed is in memory as it was read too, one at a time.
        quantization: `int8` or `int4`, in which the weights that are laid out so are kept; None: the program's dtype.
        stage: of the model, as log lines name it.

    Raises:
        CheckpointError: a file is cut off, or cannot be read, or holds NaN.
    """
    assert quantization is None or layout is not None, "nothing else has integers"
    started = time.perf_counter()
    plan = program.plan
    local = {
        name: _memory(entry.local_shape(group.rank), entry.dtype, device) for name, entry in plan.parameters.items()
    }
    packed = {} if layout is None else _packed(local, program, layout, quantization)
    sources = {
        name: tuple(replace(source, stored=index[source.stored.name]) for source in program.sources[name])
        for name in plan.parameters
    }
    _refuse_rows(sources, merge is not None)
    tensors: dict[str, Any] = dict(local)
    items: list[LoadItem | RowItem] = []
    for name, own in _items_by_name(load_items(local, plan, sources, group.rank)).items():
        if layout and name in packed and merge is None and _come_in_panels(own, local[name], layout.rows_of_panel):
            integers = _integers_of(own, packed[name])
            tensors[name] = _allocate(local[name], layout, packed[name], integers)
            items += [_packing(item, local[name], tensors[name], layout.rows_of_panel, integers) for item in own]
        else:
            items += own
    _tell(program, sources, items, quantization, group, stage)
    del local
    waiting = Counter(item.name for item in items if isinstance(item, LoadItem))

    def finish(item: LoadItem) -> None:
        refuse_nan(item)
        if merge is not None:
            merge(item)
        waiting[item.name] -= 1
        if layout and waiting[item.name] == 0 and item.name in packed:
            tensors[item.name] = _pack(tensors[item.name], layout, packed[item.name])

    load_tensors(_handed_over(items), load_progress(group, stage), finish)
    tensors |= {alias: tensors[name] for name, entry in plan.parameters.items() for alias in entry.aliases}
    tensors |= {name: buffer.to(device) for name, buffer in program.buffers.items()}
    return RankModel(program, tensors, time.perf_counter() - started)


def _refuse_rows(sources: Sources, is_merged: bool) -> None:
    """What an adapter changes is said of whole stored tensors."""
    for name, own in sources.items():
        if is_merged and any(source.rows for source in own):
            raise CheckpointError(
                f"{name!r} is stored as some of the rows of {own[0].stored.name!r}, so an adapter cannot be merged: "
                "merge it with PEFT and save the model"
            )


def _tell(
    program: RankProgram,
    sources: Sources,
    items: Sequence[LoadItem | RowItem],
    quantization: str | None,
    group: TensorParallelGroup,
    stage: int,
) -> None:
    if group.rank:
        return
    _tell_of_codes(sources, items, quantization, program.dtype)
    if program.untied and not stage:
        names = ", ".join(program.untied)
        logger.info("%s: tied by config.json, but stored with values of their own, so they are not tied", names)


def _tell_of_codes(
    sources: Sources, items: Sequence[LoadItem | RowItem], quantization: str | None, dtype: torch.dtype
) -> None:
    """Say what becomes of a quantised checkpoint: its weights are computed, or stay integers, and nothing else is
    quantised."""
    stored = {source.stored.name: source.stored.form for own in sources.values() for source in own}
    kept = {item.source.name: item for item in items if isinstance(item, IntegerItem)}
    if forms := sorted({form for name, form in stored.items() if form and name not in kept}):
        again = f" and made {quantization} anew, which rounds them a second time" if quantization else ""
        logger.info(
            "weights stored as %s are computed as they are read%s; activations keep theirs", ", ".join(forms), again
        )
    if kept:
        rounded = {_short(item.integers.scales.dtype) for item in kept.values()} - {_short(dtype)}
        note = f", their scales of {', '.join(sorted(rounded))} rounded to {_short(dtype)}" if rounded else ""
        logger.info(
            "%d weights stored as %s stay the integers that they are as %s%s; activations keep theirs",
            len(kept),
            ", ".join(sorted({item.source.form for item in kept.values()})),
            quantization,
            note,
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_progress(group: TensorParallelGroup, stage: int = 0) -> Progress:
    """Of one rank's load, told by the first rank of each stage: `ts-parallel serve` makes a bar of its log lines."""
    label = f"loading stage {stage}, rank {group.rank} of {group.size}"
    return Progress(label, is_shown=group.rank == 0, seconds_between_lines=_SECONDS_BETWEEN_LINES)


def _memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return make_tensor(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def _items_by_name(items: Sequence[LoadItem]) -> dict[str, list[LoadItem]]:
    found: dict[str, list[LoadItem]] = defaultdict(list)
    for item in items:
        found[item.name].append(item)
    return found


def _first_row(item: LoadItem, weight: torch.Tensor) -> int:
    return (item.target.storage_offset() - weight.storage_offset()) // weight.shape[1]


def _come_in_panels(items: Sequence[LoadItem], weight: torch.Tensor, panel: int) -> bool:
    """Whether each of the items, which are all of `weight` `[O, I]`, brings whole panels of its rows."""
    for item in items:
        first, target = _first_row(item, weight), item.target
        ends_panel = len(target) % panel == 0 or first + len(target) == len(weight)
        if target.ndim != 2 or target.shape[1] != weight.shape[1] or first % panel or not ends_panel:
            return False
        if len(item.source.parts) > 1:
            return False
    return True


@dataclass(frozen=True)
class _Integers:
    """What all of a weight's items are stored as, by the source's name."""

    by_source: Mapping[str, RowIntegers]
    group: int
    """Inputs that a rank keeps, of which none has two scales."""


def _integers_of(items: Sequence[LoadItem], quantization: str | None) -> _Integers | None:
    """None where a weight that is to become such integers is not stored as ones that are as small."""
    if quantization is None:
        return None
    found = {item.source.name: row_integers_of(item.source) for item in items}
    own = {name: integers for name, integers in found.items() if integers and integers.num_bits <= _BITS[quantization]}
    groups = {own[item.source.name].group_of(item.kept) for item in items if item.source.name in own}
    if len(own) < len(found) or len(groups) != 1 or None in groups:
        return None
    return _Integers(own, next(group for group in groups if group is not None))


def _packing(
    item: LoadItem, weight: torch.Tensor, packed: PackedRows, panel: int, integers: _Integers | None
) -> RowItem:
    """The same bytes into `packed` instead of `weight`, as the integers that they are where they are those."""
    start, source, dtype = _first_row(item, weight), item.source, weight.dtype

    def put(first: int, rows: torch.Tensor) -> None:
        if packed.put(start + first, rows.to(dtype)):
            refuse_nan_in(rows, source)

    def put_integers(first: int, rows: torch.Tensor, scales: torch.Tensor) -> bool:
        return packed.put_integers(start + first, rows, scales)

    if integers is None:
        return RowItem(put, source, item.kept, panel)
    own = integers.by_source[source.name]
    return IntegerItem(put, source, item.kept, panel, put_integers, own, integers.group)


def _allocate(
    weight: torch.Tensor, layout: WeightLayout, quantization: str | None, integers: _Integers | None
) -> PackedRows:
    group = integers.group if integers else None
    return layout.allocate((weight.shape[0], weight.shape[1]), weight.dtype, quantization, group)


def _pack(weight: torch.Tensor, layout: WeightLayout, quantization: str | None) -> PackedRows:
    packed = _allocate(weight, layout, quantization, None)
    packed.put(0, weight)
    return packed


def _packed(
    weights: Mapping[str, torch.Tensor], program: RankProgram, layout: WeightLayout, quantization: str | None
) -> dict[str, str | None]:
    """The weights to lay out in panels, with what their numbers become.

    The head keeps 8 bits, and with it an embedding that it shares: at 4 it costs as much as all layers together.
    """
    found = {}
    for name in program.packable():
        if layout.takes(weights[name]) and weights[name].numel():
            found[name] = "int8" if quantization == "int4" and name == program.head else quantization
    return found


def _handed_over(items: list[LoadItem | RowItem]) -> Iterator[LoadItem | RowItem]:
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
        first, cut = _overlap(kept, start, start + length, dim - num_stacked)
        if cut.length == 0:
            return
        view = view.narrow(dim, first, cut.length)
        if dim < num_stacked:
            cut = None  # one of a stack is kept whole or not at all
    for _ in range(num_stacked):
        view = view[0]
    yield LoadItem(view, source.taken, cut, name)


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
