"""Numbers that are computed of codes while they are read: those of the whole tensor, wherever a rank cuts it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from quantised_checkpoints import KINDS, Tensors, write
from safetensors.torch import load_file

from ts_parallel.checkpoint.codes import blocks
from ts_parallel.checkpoint.index import CheckpointIndex, read_index
from ts_parallel.checkpoint.load import LoadItem, RowItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.stored import Slice, StoredTensor

SILENT = Progress("", is_shown=False)


@dataclass(frozen=True)
class Folder:
    path: Path
    index: CheckpointIndex
    weights: Tensors
    """What it stands for, in float32."""

    @property
    def coded(self) -> list[StoredTensor]:
        """One of each module's weights of the first layer."""
        return [stored for stored in self.index.values() if stored.codes and ".layers.0." in stored.name]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("kind")
    write(root / "quantised", root / "plain", KINDS[request.param])
    weights = load_file(root / "plain" / "model.safetensors")
    return Folder(root / "quantised", read_index(root / "quantised"), weights)


def read(stored: StoredTensor, kept: Slice | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = list(stored.shape)
    if kept is not None:
        shape[kept.dim] = kept.length
    target = torch.full(shape, torch.nan, dtype=dtype)
    load_tensors([LoadItem(target, stored, kept)], SILENT)
    return target


def slices(stored: StoredTensor) -> list[Slice]:
    found = []
    for dim, size in enumerate(stored.shape):
        half = size // 2
        for pieces in (((0, half),), ((half, size - half),), ((1, half // 2), (half, half - 1)), ((half, 0),)):
            found.append(Slice(dim, pieces))
    return found


def cut(whole: torch.Tensor, kept: Slice) -> torch.Tensor:
    return torch.cat([whole.narrow(kept.dim, start, length) for start, length in kept.pieces], dim=kept.dim)


def test_index_has_each_weight_once_and_nothing_of_what_it_is_made_of(folder: Folder) -> None:
    assert {name: stored.shape for name, stored in folder.index.items()} == {
        name: tuple(weight.shape) for name, weight in folder.weights.items()
    }
    assert folder.coded and all(stored.dtype == torch.bfloat16 for stored in folder.coded)
    assert pickle.loads(pickle.dumps(folder.coded)) == folder.coded  # programs carry them


@pytest.mark.parametrize("numbers_at_once", [2**20, 333])
def test_any_slice_has_the_numbers_of_the_whole(
    folder: Folder, numbers_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "NUMBERS_AT_ONCE", numbers_at_once)
    for stored in folder.coded if numbers_at_once > 333 else folder.coded[-2:]:
        whole = folder.weights[stored.name]
        assert torch.equal(read(stored), whole), stored.name
        for kept in slices(stored):
            assert torch.equal(read(stored, kept), cut(whole, kept)), (stored.name, kept)


def test_rows_come_in_whole_panels_with_the_same_numbers(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "NUMBERS_AT_ONCE", 600)
    for stored in folder.coded:
        for kept in [None, *slices(stored)[::3]] if len(stored.shape) == 2 else []:
            whole = folder.weights[stored.name]
            expected = whole if kept is None else cut(whole, kept)
            found: list[torch.Tensor] = []

            def put(first: int, rows: torch.Tensor, found: list[torch.Tensor] = found) -> None:
                assert first == sum(map(len, found)) and first % 4 == 0 and rows.stride(1) == 1
                found.append(rows)

            load_tensors([RowItem(put, stored, kept, 4)], SILENT)
            assert torch.equal(torch.cat(found) if found else expected[:0], expected), (stored.name, kept)


def test_running_dtype_rounds_what_the_format_computes_once(folder: Folder) -> None:
    for stored in folder.coded:
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(read(stored, dtype=dtype), folder.weights[stored.name].to(dtype)), stored.name
