"""Whether the parts that several ranks wrote make up a tensor. Knows no file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ts_parallel.errors import CheckpointError

_MOST_CELLS = 10_000_000


def check_boxes(
    name: str, shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], folder: Path
) -> None:
    """Whether the `(corner, shape)` boxes hold each element of a tensor of `shape` exactly once.

    Raises:
        CheckpointError: they do not; names the tensor and the first place at fault.
    """
    for corner, size in boxes:
        if len(corner) != len(shape) or len(size) != len(shape) or any(map(_is_outside, corner, size, shape)):
            raise CheckpointError(
                f"a part of {name!r} in {folder} begins at {list(corner)} with shape {list(size)}, "
                f"outside of its shape {list(shape)}"
            )
    if not math.prod(shape):
        return
    # Between neighbouring borders of any boxes nothing changes, so it is enough to look once in each of these cells.
    borders = [
        sorted({0, shape[dim], *(corner[dim] + end for corner, size in boxes for end in (0, size[dim]))})
        for dim in range(len(shape))
    ]
    place = [{border: index for index, border in enumerate(own)} for own in borders]
    if math.prod(map(len, borders)) > _MOST_CELLS:
        raise CheckpointError(f"the {len(boxes)} parts of {name!r} in {folder} form no grid")
    counts = np.zeros([len(own) - 1 for own in borders], dtype=np.int32)
    for corner, size in boxes:
        cells = tuple(
            slice(own[begin], own[begin + length]) for own, begin, length in zip(place, corner, size, strict=True)
        )
        counts[cells] += 1
    if (counts == 1).all():
        return
    cell = tuple(int(index) for index in np.argwhere(counts != 1)[0])
    spans = [list(pairwise(own))[index] for own, index in zip(borders, cell, strict=True)]
    times = "is missing" if counts[cell] == 0 else f"is there {counts[cell]} times"
    where = "".join(f"[{begin}:{end}]" for begin, end in spans)
    raise CheckpointError(f"{name!r}{where} of shape {list(shape)} {times} in {folder}")


def _is_outside(begin: int, length: int, size: int) -> bool:
    return begin < 0 or length < 0 or begin + length > size
