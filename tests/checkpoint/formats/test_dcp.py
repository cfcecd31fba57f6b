"""A torch.distributed.checkpoint is an index of the model's tensors, or one line says what is wrong with it."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from malicious import Malicious
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from ts_parallel.checkpoint.index import CheckpointIndex, StoredTensor, read_index
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.errors import CheckpointError

SILENT = Progress("weights", is_shown=False)
WHOLE = torch.arange(24.0).view(6, 4)
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]


def save_alone(folder: Path, state: dict[str, Any], **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        save(state, storage_writer=FileSystemWriter(folder, **options), no_dist=True)


@dataclass(frozen=True)
class Chunk:
    corner: tuple[int, ...]
    content: object
    """What torch.save writes."""
    shape: tuple[int, ...]
    """What the metadata says."""


def rows(start: int, end: int) -> Chunk:
    return Chunk((start, 0), WHOLE[start:end].clone(), (end - start, 4))


def save_chunks(folder: Path, chunks: Sequence[Chunk], changes: dict[str, object] | None = None) -> None:
    """`x` of the shape of `WHOLE` in these chunks, all in one file; `changes` to each chunk's place."""
    written = io.BytesIO()
    places = {}
    for chunk in chunks:
        start = written.tell()
        torch.save(chunk.content, written)
        place = {"relative_path": "__0_0.distcp", "offset": start, "length": written.tell() - start, **(changes or {})}
        places[MetadataIndex("x", chunk.corner)] = _StorageInfo(**place)  # type: ignore[arg-type]
    (folder / "__0_0.distcp").write_bytes(written.getvalue())
    boxes = [ChunkStorageMetadata(torch.Size(chunk.corner), torch.Size(chunk.shape)) for chunk in chunks]
    entry = TensorStorageMetadata(TensorProperties(torch.float32), WHOLE.shape, boxes)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"x": entry}, storage_data=places)))


def load_whole(source: StoredTensor) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=source.dtype)
    load_tensors([LoadItem(target, source, None)], SILENT)
    return target


def assert_same(index: CheckpointIndex, expected: dict[str, torch.Tensor]) -> None:
    assert index.keys() == expected.keys()
    for name, tensor in expected.items():
        found = load_whole(index[name])
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("options", [{}, {"single_file_per_rank": False}, {"thread_count": 3}])
def test_state_dict_is_loaded_as_it_was_saved(tmp_path: Path, options: dict[str, object]) -> None:
    tensors = {str(dtype): (8 * torch.rand(3, 5)).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "nothing": torch.empty(0, 4), "view": torch.rand(6, 4)[2:4]}
    save_alone(tmp_path, {**tensors, "_extra_state": b"blob", "version": 3}, **options)
    assert_same(read_index(tmp_path), tensors)


def test_model_is_found_beside_an_optimizer(tmp_path: Path) -> None:
    model = {"model.norm.weight": torch.rand(3), "lm_head.weight": torch.rand(5, 3)}
    optimizer = {"state": {0: {"exp_avg": torch.rand(3), "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    save_alone(tmp_path, {"app": {"model": model, "optim": optimizer}, "epoch": torch.tensor(3)})
    assert_same(read_index(tmp_path), model)


def test_file_of_an_optimizer_alone_may_be_missing(tmp_path: Path) -> None:
    """As where only what serves was copied."""
    save_alone(tmp_path, {"model": {"x": WHOLE}, "optim": {"x": torch.rand(9)}}, single_file_per_rank=False)
    sizes = {file: file.stat().st_size for file in tmp_path.glob("*.distcp")}
    min(sizes, key=lambda file: sizes[file]).unlink()
    assert_same(read_index(tmp_path), {"x": WHOLE})


def test_chunks_are_found_in_any_order_and_without_a_planners_notes(tmp_path: Path) -> None:
    save_chunks(tmp_path, [rows(3, 6), rows(0, 2), rows(6, 6), rows(2, 3)])
    index = read_index(tmp_path)
    assert [part.corner for part in index["x"].parts] == [(0, 0), (2, 0), (3, 0)]
    assert_same(index, {"x": WHOLE})


LEFT, RIGHT = Chunk((0, 0), WHOLE[:, :2].clone(), (6, 2)), Chunk((0, 2), WHOLE[:, 2:].clone(), (6, 2))


def test_chunks_side_by_side_are_joined(tmp_path: Path) -> None:
    save_chunks(tmp_path, [RIGHT, LEFT])
    assert_same(read_index(tmp_path), {"x": WHOLE})


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([rows(0, 2), rows(3, 6)], r"'x'\[2:3\]\[0:4\] of shape \[6, 4\] is missing"),
        ([rows(0, 3), rows(2, 6)], r"'x'\[2:3\]\[0:4\] of shape \[6, 4\] is there 2 times"),
        ([LEFT], r"'x'\[0:6\]\[2:4\] of shape \[6, 4\] is missing"),
        ([LEFT, rows(0, 6)], r"'x'\[0:6\]\[0:2\] of shape \[6, 4\] is there 2 times"),
        (
            [rows(0, 5), Chunk((5, 0), WHOLE[:2], (2, 4))],
            r"at \[5, 0\] with shape \[2, 4\], outside of its",
        ),
        ([Chunk((0,), WHOLE, (6, 4))], "outside of its shape"),
        ([rows(0, 2), replace(rows(2, 6), content=WHOLE[2:5].clone())], r"shape \[3, 4\] of .*, but \[4, 4\] of"),
        ([replace(rows(0, 6), content=WHOLE.double())], "of torch.float64 in .*, but .* of torch.float32"),
        ([replace(rows(0, 6), content={"x": 3})], "holds no tensor at byte 0, where 'x' should be"),
        ([replace(rows(0, 6), content=WHOLE.t().contiguous().t())], r"strides \[1, 6\]: call \.contiguous"),
        ([Chunk((0, 0), WHOLE, (-6, 4))], "is no metadata of torch.distributed.checkpoint"),
    ],
)
def test_chunks_that_make_up_no_tensor_are_refused(tmp_path: Path, chunks: list[Chunk], message: str) -> None:
    save_chunks(tmp_path, chunks)
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_path": "gone.distcp"}, r"names 'gone\.distcp', which is missing"),
        ({"relative_path": "../__0_0.distcp"}, "which is not a file of its own folder"),
        ({"relative_path": "/etc/passwd"}, "which is not a file of its own folder"),
        ({"relative_path": 3}, "no readable place for 'x'"),
        ({"offset": -1}, "no readable place for 'x'"),
        ({"length": -1}, "no readable place for 'x'"),
        ({"offset": 1}, "is cut off: .* at least 1 more are needed for 'x'"),
        ({"length": 100}, "is cut off or damaged"),
        ({"offset": 3, "length": 700}, "is not in torch.save's zip format"),
        ({"transform_descriptors": ["stream.zstd"]}, r"was written through \['stream\.zstd'\]"),
    ],
)
def test_place_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save_chunks(tmp_path, [rows(0, 6)], changes)
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path)


def test_file_that_was_cut_off_is_said_to_be_so(tmp_path: Path) -> None:
    save_chunks(tmp_path, [rows(0, 3), rows(3, 6)])
    file = tmp_path / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 5)
    with pytest.raises(CheckpointError, match=r"is cut off: .* at least 5 more are needed for 'x'"):
        read_index(tmp_path)


@pytest.mark.parametrize("function", [os.system, eval, FileSystemWriter])
def test_metadata_that_calls_anything_is_refused_and_nothing_is_called(
    tmp_path: Path, function: Callable[..., object]
) -> None:
    save_chunks(tmp_path, [rows(0, 6)])
    file = tmp_path / ".metadata"
    evil = Malicious(function, f"touch {tmp_path / 'was-run'}")
    file.write_bytes(pickle.dumps(replace(pickle.loads(file.read_bytes()), planner_data=evil)))
    with pytest.raises(CheckpointError, match=rf"holds a .*{function.__name__}, which is not read from a pickle"):
        read_index(tmp_path)
    assert not (tmp_path / "was-run").exists()


def test_chunk_that_calls_anything_is_refused_and_nothing_is_called(tmp_path: Path) -> None:
    evil = Malicious(os.system, f"touch {tmp_path / 'was-run'}")
    save_chunks(tmp_path, [replace(rows(0, 6), content=evil)])
    with pytest.raises(CheckpointError, match="system, which is not read from a pickle"):
        read_index(tmp_path)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("content", [{}, [], 3, Metadata({}), Metadata({"x": 3}, storage_data=[])])  # type: ignore[dict-item]
def test_other_pickle_is_no_metadata(tmp_path: Path, content: object) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"is no metadata of|holds no tensor of a model"):
        read_index(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_torn_metadata_is_damaged(tmp_path: Path, kept: int) -> None:
    save_chunks(tmp_path, [rows(0, 6)])
    file = tmp_path / ".metadata"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="is damaged: its pickle cannot be read"):
        read_index(tmp_path)


def test_only_headers_are_read_for_the_index(tmp_path: Path) -> None:
    save_alone(tmp_path, {"x": torch.zeros(1_000_000)})
    before = int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
    index = read_index(tmp_path)
    after = int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
    assert index["x"].num_bytes == 4_000_000
    assert after - before < 200_000
