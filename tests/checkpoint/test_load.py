"""What a rank keeps of a tensor equals the same slice of the whole tensor, and no other byte is read."""

from __future__ import annotations

import io
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tqdm import tqdm

from ts_parallel.checkpoint import load, progress
from ts_parallel.checkpoint.index import SINGLE_FILE, StoredTensor, read_index
from ts_parallel.checkpoint.load import LoadItem, RowItem, byte_ranges, load_tensors, refuse_nan
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.stored import Slice, StoredPart, stored_whole
from ts_parallel.errors import CheckpointError

SILENT = Progress("weights", is_shown=False)
WHOLE = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))

SLICES = {
    "rows": Slice(0, ((2, 3),)),
    "middle dim": Slice(1, ((1, 2),)),
    "columns": Slice(2, ((3, 2),)),
    "several pieces": Slice(0, ((4, 1), (0, 2))),
    "pieces of columns": Slice(2, ((0, 1), (2, 2))),
    "no rows": Slice(0, ((6, 0),)),
    "all of a dim": Slice(1, ((0, 4),)),
    "whole": None,
}


def stored(folder: Path, tensor: torch.Tensor) -> StoredTensor:
    """The tensor in a file of its own, behind another one."""
    save_file({"first": torch.full((3,), 7, dtype=torch.int64), "x": tensor}, folder / SINGLE_FILE)
    return read_index(folder)["x"]


def indexed(whole: torch.Tensor, kept: Slice | None) -> torch.Tensor:
    """`kept` by plain indexing."""
    if kept is None:
        return whole
    return torch.cat([whole.narrow(kept.dim, start, length) for start, length in kept.pieces], dim=kept.dim)


def loaded(source: StoredTensor, kept: Slice | None, dtype: torch.dtype) -> torch.Tensor:
    target = torch.full_like(indexed(torch.empty(source.shape), kept), 99, dtype=dtype)
    load_tensors([LoadItem(target, source, kept)], SILENT, refuse_nan)
    return target


def note_reads(monkeypatch: pytest.MonkeyPatch, longest: int = 1 << 40) -> list[tuple[int, int]]:
    """The (offset, bytes) of every read from now on; none brings more than `longest` bytes."""
    reads: list[tuple[int, int]] = []
    preadv = os.preadv

    def noted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, [buffers[0][:longest]], offset)
        reads.append((offset, count))
        return count

    monkeypatch.setattr(os, "preadv", noted)
    return reads


@pytest.mark.parametrize("kept", SLICES.values(), ids=SLICES.keys())
def test_kept_slice_equals_the_slice_of_the_whole_tensor(tmp_path: Path, kept: Slice | None) -> None:
    assert torch.equal(loaded(stored(tmp_path, WHOLE), kept, WHOLE.dtype), indexed(WHOLE, kept))


# 24 bytes are six elements of float32: smaller than the tensor, and no divisor of its rows of five.
@pytest.mark.parametrize("staging", [8, 24, 1 << 20])
@pytest.mark.parametrize("kept", SLICES.values(), ids=SLICES.keys())
def test_dtype_is_converted_through_a_staging_buffer_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Slice | None, staging: int
) -> None:
    monkeypatch.setattr(load, "STAGING_BYTES", staging)
    source = stored(tmp_path, WHOLE)
    reads = note_reads(monkeypatch)
    assert torch.equal(loaded(source, kept, torch.bfloat16), indexed(WHOLE, kept).bfloat16())
    assert all(count <= staging for _, count in reads)


def test_bytes_of_the_same_dtype_need_no_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "STAGING_BYTES", 8)
    source = stored(tmp_path, WHOLE)
    reads = note_reads(monkeypatch)
    assert torch.equal(loaded(source, None, WHOLE.dtype), WHOLE)
    assert reads == [(source.offset, WHOLE.nbytes)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_every_dtype_reaches_float32_and_itself(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = (8 * WHOLE).to(dtype)
    source = stored(tmp_path, whole)
    assert torch.equal(loaded(source, SLICES["columns"], torch.float32), indexed(whole.float(), SLICES["columns"]))
    assert torch.equal(loaded(source, None, dtype).float(), whole.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalar_and_empty_tensors_are_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    assert loaded(stored(tmp_path, torch.tensor(2.5)), None, dtype).item() == 2.5
    assert loaded(stored(tmp_path, torch.empty(0, 4)), None, dtype).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameter_is_filled_in_place(tmp_path: Path, dtype: torch.dtype) -> None:
    target = torch.nn.Parameter(torch.zeros(WHOLE.shape, dtype=dtype))
    address = target.data_ptr()
    load_tensors([LoadItem(target, stored(tmp_path, WHOLE), None)], SILENT)
    assert torch.equal(target, WHOLE.to(dtype))
    assert target.data_ptr() == address


@st.composite
def kept_slices(draw: st.DrawFn, shortest: int = 0) -> tuple[torch.Tensor, Slice]:
    """A small tensor, and pieces of one of its dims in any order, neighbours, overlaps and empty ones included."""
    shape = draw(st.lists(st.integers(shortest, 5), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    starts = draw(st.lists(st.integers(0, shape[dim]), min_size=1, max_size=3))
    pieces = tuple((start, draw(st.integers(0, shape[dim] - start))) for start in starts)
    return torch.arange(math.prod(shape), dtype=torch.int16).view(shape), Slice(dim, pieces)


@settings(max_examples=200, deadline=None)
@given(case=kept_slices(), offset=st.integers(0, 9))
def test_byte_ranges_of_any_slice_are_the_bytes_that_indexing_gives(
    case: tuple[torch.Tensor, Slice], offset: int
) -> None:
    whole, kept = case
    file = bytes([255] * offset) + whole.numpy().tobytes()
    source = stored_whole("x", Path("file"), whole.dtype, tuple(whole.shape), offset)
    ranges = list(byte_ranges(source, kept))
    expected = indexed(whole, kept)
    assert b"".join(file[start : start + length] for start, length in ranges) == expected.numpy().tobytes()
    assert sum(length for _, length in ranges) == expected.nbytes
    assert kept.length == expected.shape[kept.dim]


@settings(max_examples=100, deadline=None)
@given(
    case=kept_slices(shortest=1),
    staging=st.integers(2, 64),
    in_vain=st.integers(0, 8),
    dtype=st.sampled_from([torch.int16, torch.float64]),
)
def test_any_slice_is_loaded_as_indexing_gives_it(
    case: tuple[torch.Tensor, Slice], staging: int, in_vain: int, dtype: torch.dtype
) -> None:
    whole, kept = case
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "STAGING_BYTES", staging)
        patch.setattr(load, "MOST_BYTES_READ_IN_VAIN", in_vain)
        assert torch.equal(loaded(stored(Path(folder), whole), kept, dtype), indexed(whole, kept).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", SLICES.values(), ids=SLICES.keys())
def test_only_the_kept_bytes_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Slice | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(load, "MOST_BYTES_READ_IN_VAIN", 0)
    source = stored(tmp_path, WHOLE)
    reads = note_reads(monkeypatch)
    loaded(source, kept, dtype)
    assert reads == [(offset, length) for offset, length in byte_ranges(source, kept) if length]
    assert sum(count for _, count in reads) == indexed(WHOLE, kept).nbytes


def test_read_that_brings_less_than_asked_for_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gives at most 2 GiB a call, and less when a signal comes."""
    source = stored(tmp_path, WHOLE)
    reads = note_reads(monkeypatch, longest=7)
    assert torch.equal(loaded(source, SLICES["rows"], torch.float32), indexed(WHOLE, SLICES["rows"]))
    assert len(reads) > indexed(WHOLE, SLICES["rows"]).nbytes // 7


def test_files_are_read_from_front_to_back_whatever_the_order_of_the_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wholes = {name: torch.rand(3, 2) for name in "dbca"}
    save_file(wholes, tmp_path / SINGLE_FILE)
    index = read_index(tmp_path)
    targets = {name: torch.empty(3, 2) for name in "cadb"}
    reads = note_reads(monkeypatch)
    load_tensors([LoadItem(target, index[name], None) for name, target in targets.items()], SILENT)
    assert len(reads) == 4 and reads == sorted(reads)
    assert all(torch.equal(targets[name], whole) for name, whole in wholes.items())


def test_each_file_is_opened_once_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: list[StoredTensor] = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        save_file({"x": torch.rand(3), "y": torch.rand(3)}, folder / SINGLE_FILE)
        tensors += read_index(folder).values()
    items = [LoadItem(torch.empty(3), tensor, None) for tensor in sorted(tensors, key=lambda tensor: tensor.name)]
    opened: list[Path] = []
    open_ = os.open

    def noted(file: Path, flags: int) -> int:
        opened.append(file)
        return open_(file, flags)

    monkeypatch.setattr(os, "open", noted)
    load_tensors(items, SILENT)
    assert opened == [tmp_path / "a" / SINGLE_FILE, tmp_path / "b" / SINGLE_FILE]
    assert not open_files()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensor_with_nan_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = WHOLE.to(dtype)
    whole[3, 1, 2] = math.nan
    source = stored(tmp_path, whole)
    with pytest.raises(CheckpointError, match=r"'x' in .* holds NaN$"):
        loaded(source, None, dtype)
    assert torch.equal(loaded(source, Slice(0, ((0, 3),)), dtype), whole[:3])


def test_infinite_values_and_sums_are_no_nan(tmp_path: Path) -> None:
    for values in ([math.inf, -math.inf, 1.0], [60000.0] * 3, [-60000.0] * 3):
        whole = torch.tensor(values, dtype=torch.float16)
        assert torch.equal(loaded(stored(tmp_path, whole), None, torch.float16), whole)


def open_files() -> set[str]:
    """The checkpoint files that this process holds open."""
    descriptors = Path("/proc/self/fd").iterdir()
    return {name for name in (os.path.realpath(descriptor) for descriptor in descriptors) if SINGLE_FILE in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_cut_off_after_its_index_was_read_is_named_with_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    source = stored(tmp_path, WHOLE)
    os.truncate(source.file, source.offset + source.num_bytes - 4)
    with pytest.raises(CheckpointError, match=f"{source.file} ends before 'x' does"):
        loaded(source, None, dtype)
    assert not open_files()


def remove(file: Path) -> None:
    file.unlink()


def put_a_folder_in_its_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("harm", [remove, put_a_folder_in_its_place])
def test_file_that_cannot_be_read_any_more_is_named(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    source = stored(tmp_path, WHOLE)
    harm(source.file)
    with pytest.raises(CheckpointError, match=str(source.file)):
        loaded(source, None, torch.float32)


@st.composite
def stored_parts(draw: st.DrawFn) -> tuple[torch.Tensor, list[tuple[tuple[int, ...], torch.Tensor]]]:
    """A small tensor, and the boxes that a grid cuts it into, in any order."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    whole = torch.arange(math.prod(shape), dtype=torch.int16).view(shape)
    boxes = [((0,) * len(shape), whole)]
    for dim in range(len(shape)):
        length = draw(st.integers(1, 5))
        boxes = [
            ((*corner[:dim], corner[dim] + number * length, *corner[dim + 1 :]), piece)
            for corner, box in boxes
            for number, piece in enumerate(box.split(length, dim))  # type: ignore[no-untyped-call]
        ]
    return whole, draw(st.permutations(boxes))


def store_parts(folder: Path, whole: torch.Tensor, boxes: list[tuple[tuple[int, ...], torch.Tensor]]) -> StoredTensor:
    """Each part behind a byte of its own file, two files in turn."""
    parts = []
    files = [folder / "a", folder / "b"]
    for number, (corner, box) in enumerate(boxes):
        file = files[number % 2]
        with file.open("ab") as stream:
            stream.write(b"!")
            offset = stream.tell()
            stream.write(box.contiguous().numpy().tobytes())
        parts.append(StoredPart(file, corner, tuple(box.shape), offset, box.nbytes))
    return StoredTensor("x", whole.dtype, tuple(whole.shape), tuple(parts))


@settings(max_examples=150, deadline=None)
@given(
    case=stored_parts(),
    data=st.data(),
    staging=st.integers(2, 40),
    dtype=st.sampled_from([torch.int16, torch.float64]),
)
def test_any_slice_of_a_tensor_in_parts_is_loaded_as_indexing_gives_it(
    case: tuple[torch.Tensor, list[tuple[tuple[int, ...], torch.Tensor]]],
    data: st.DataObject,
    staging: int,
    dtype: torch.dtype,
) -> None:
    whole, boxes = case
    dim = data.draw(st.integers(0, whole.ndim - 1))
    starts = data.draw(st.lists(st.integers(0, whole.shape[dim]), max_size=3))
    pieces = tuple((start, data.draw(st.integers(0, whole.shape[dim] - start))) for start in starts)
    kept = Slice(dim, pieces) if pieces else None
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "STAGING_BYTES", staging)
        patch.setattr(load, "MOST_BYTES_READ_IN_VAIN", 0)
        reads = note_reads(patch)
        source = store_parts(Path(folder), whole, boxes)
        found = loaded(source, kept, dtype)
        assert torch.equal(found, indexed(whole, kept).to(dtype))
        assert sum(count for _, count in reads) == found.numel() * whole.dtype.itemsize


def test_item_is_loaded_once_its_last_part_is_and_files_are_read_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wholes = [torch.arange(6, dtype=torch.int16), torch.arange(6, 12, dtype=torch.int16)]
    sources = [store_parts(tmp_path, whole, [((0,), whole[:2]), ((2,), whole[2:])]) for whole in wholes]
    targets = [torch.zeros(6, dtype=torch.int16) for _ in wholes]
    order: list[str] = []
    open_ = os.open

    def noted(file: Path, flags: int) -> int:
        order.append(file.name)
        return open_(file, flags)

    def on_loaded(item: LoadItem) -> None:
        assert torch.equal(item.target, wholes[int(item.name)])
        order.append(item.name)

    monkeypatch.setattr(os, "open", noted)
    items = [LoadItem(targets[number], sources[number], None, str(number)) for number in (1, 0)]
    load_tensors(items, SILENT, on_loaded)
    assert order == ["a", "b", "0", "1"]


def load_two(folder: Path, shown: Progress) -> None:
    save_file({"a": torch.zeros(750), "b": torch.zeros(250)}, folder / SINGLE_FILE)
    index = read_index(folder)
    load_tensors((LoadItem(torch.empty(index[name].shape), index[name], None) for name in ("a", "b")), shown)


def lines_of(records: Iterable[logging.LogRecord]) -> list[str]:
    return [record.getMessage().partition(" in ")[0] for record in records]


def test_progress_is_log_lines_where_no_terminal_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", no_terminal)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level(logging.INFO):
        load_two(tmp_path, Progress("weights"))
    assert lines_of(caplog.records) == ["weights: 75 % of 0.0 MB", "weights: 100 % of 0.0 MB", "weights: 0.0 MB"]
    assert no_terminal.getvalue() == ""


def test_progress_says_only_the_sum_of_a_short_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e9)
    with caplog.at_level(logging.INFO):
        load_two(tmp_path, Progress("weights"))
    assert lines_of(caplog.records) == ["weights: 0.0 MB"]


def test_progress_is_a_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "tqdm", partial(tqdm, mininterval=0, miniters=1))  # draws every step
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level(logging.INFO):
        load_two(tmp_path, Progress("weights"))
    assert "weights:  75%" in terminal.getvalue() and "weights: 100%" in terminal.getvalue()
    assert lines_of(caplog.records) == ["weights: 0.0 MB"]


def test_progress_of_other_ranks_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level(logging.INFO):
        load_two(tmp_path, SILENT)
    assert (terminal.getvalue(), caplog.records) == ("", [])


def test_columns_are_read_with_their_rows_where_little_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stored(tmp_path, WHOLE)
    reads = note_reads(monkeypatch)
    assert torch.equal(loaded(source, SLICES["columns"], WHOLE.dtype), indexed(WHOLE, SLICES["columns"]))
    assert reads == [(source.offset, WHOLE.nbytes)]


@settings(max_examples=150, deadline=None)
@given(case=kept_slices(shortest=1), staging=st.integers(2, 64), rows_at_once=st.integers(1, 4))
def test_rows_are_handed_over_as_indexing_gives_them(
    case: tuple[torch.Tensor, Slice], staging: int, rows_at_once: int
) -> None:
    tensor, kept = case
    whole = tensor.view(len(tensor), -1)
    if kept.dim > 1 or whole.shape[min(kept.dim, 1)] != tensor.shape[kept.dim]:
        kept = Slice(0, ((0, len(whole)),))
    given: list[torch.Tensor] = []

    def put(first: int, rows: torch.Tensor) -> None:
        assert first == sum(map(len, given)) and first % rows_at_once == 0
        assert len(rows) % rows_at_once == 0 or first + len(rows) == len(indexed(whole, kept))
        assert len(rows) <= max(rows_at_once, staging // (2 * whole.shape[1]))
        given.append(rows.clone())

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "STAGING_BYTES", staging)
        load_tensors([RowItem(put, stored(Path(folder), whole), kept, rows_at_once)], SILENT, refuse_nan)
    expected = indexed(whole, kept)
    assert torch.equal(torch.cat([expected[:0], *given]), expected)


STEP = 2**16


@pytest.mark.parametrize("kept", [None, Slice(0, ((0, 8),)), Slice(0, ((8, 8),))], ids=["whole", "first", "last"])
def test_thread_goes_ahead_of_what_is_read_and_not_too_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Slice | None
) -> None:
    save_file({f"x{number}": torch.zeros(16, STEP, dtype=torch.uint8) for number in range(4)}, tmp_path / SINGLE_FILE)
    index = read_index(tmp_path)
    window = 4 * STEP
    monkeypatch.setattr(load, "READ_AHEAD_BYTES", window)
    monkeypatch.setattr(load, "STAGING_BYTES", STEP)
    monkeypatch.setattr(load, "_BYTES_A_LOOK", STEP)
    monkeypatch.setattr(load, "_is_cached", lambda descriptor, offset: False)
    touched: list[int] = []
    has_read: list[int] = []
    furthest: list[int] = []
    preadv = os.preadv

    def noted(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if threading.current_thread().name == "read-ahead":
            furthest.append(len(touched) * STEP - len(has_read) * STEP)
            touched.append(offset)
            assert len(buffers[0]) == STEP
        return preadv(descriptor, buffers, offset, flags)

    def put(first: int, rows: torch.Tensor) -> None:
        deadline = time.monotonic() + 20
        num_wanted = min(len(has_read) + 4, len(index) * (16 if kept is None else 8))
        while len(touched) < num_wanted:  # it comes so far without what follows here
            assert time.monotonic() < deadline
            time.sleep(0.001)
        has_read.append(first)

    monkeypatch.setattr(os, "preadv", noted)
    load_tensors([RowItem(put, tensor, kept, 1) for tensor in index.values()], SILENT)
    spans = [next(iter(byte_ranges(tensor, kept))) for tensor in sorted(index.values(), key=lambda own: own.offset)]
    assert touched == [start for offset, length in spans for start in range(offset, offset + length, STEP)]
    assert max(furthest) <= window + STEP


def test_thread_reads_nothing_that_is_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": torch.zeros(64, STEP, dtype=torch.uint8)}, tmp_path / SINGLE_FILE)
    (tensor,) = read_index(tmp_path).values()
    is_cached, looks, preadv = load._is_cached, list[int](), os.preadv
    with tensor.file.open("rb") as file:
        if not is_cached(file.fileno(), 0):
            pytest.skip("this file system does not say what is in the page cache")

    def noted(descriptor: int, offset: int) -> bool:
        looks.append(offset)
        return is_cached(descriptor, offset)

    def put(first: int, rows: torch.Tensor) -> None:
        deadline = time.monotonic() + 20
        while len(looks) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def one_byte_at_most_ahead(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        assert len(buffers[0]) == 1 or threading.current_thread().name != "read-ahead", "it is there"
        return preadv(descriptor, buffers, offset, flags)

    monkeypatch.setattr(load, "_is_cached", noted)
    monkeypatch.setattr(os, "preadv", one_byte_at_most_ahead)
    load_tensors([RowItem(put, tensor, None, 64)], SILENT)
    assert looks == [tensor.offset + start for start in range(0, tensor.num_bytes, 2**20)]


def test_thread_ends_with_a_load_that_fails(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(64, STEP, dtype=torch.uint8)}, tmp_path / SINGLE_FILE)

    def put(first: int, rows: torch.Tensor) -> None:
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        load_tensors([RowItem(put, read_index(tmp_path)["x"], None, 1)], SILENT)
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    assert not open_files()
