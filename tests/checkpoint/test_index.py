"""The index of a folder is what its files hold, or one line that says which file is at fault."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import deserialize, safe_open
from safetensors.torch import save_file

from ts_parallel.checkpoint.index import SHARD_INDEX, SINGLE_FILE, StoredTensor, has_plain_names, read_index
from ts_parallel.errors import CheckpointError

TENSORS = {
    "double": torch.rand(3, 2, dtype=torch.float64),
    "single": torch.rand(2, 3, 4),
    "half": torch.rand(5, 1).half(),
    "brain": torch.rand(7).bfloat16(),
    "e4m3": torch.rand(2, 2).to(torch.float8_e4m3fn),
    "e5m2": torch.rand(3).to(torch.float8_e5m2),
    "long": torch.randint(-99, 99, (2, 2)),
    "int": torch.randint(-99, 99, (3,), dtype=torch.int32),
    "short": torch.randint(-99, 99, (3,), dtype=torch.int16),
    "byte": torch.randint(-99, 99, (5,), dtype=torch.int8),
    "unsigned": torch.randint(0, 99, (5,), dtype=torch.uint8),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0, 4),
}


def write(file: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file as its header says, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(**changes: object) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def write_shard_index(folder: Path, files: object) -> None:
    (folder / SHARD_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def bytes_of(stored: StoredTensor) -> bytes:
    return stored.file.read_bytes()[stored.offset : stored.offset + stored.num_bytes]


def test_index_says_what_the_safetensors_library_says(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_FILE
    save_file(TENSORS, file, metadata={"format": "pt"})
    index = read_index(tmp_path)
    with safe_open(file, "pt") as library:
        assert set(index) == set(library.keys()) == set(TENSORS)
        for name, stored in index.items():
            assert (stored.name, stored.file) == (name, file)
            assert stored.shape == tuple(library.get_slice(name).get_shape())
            assert stored.dtype == library.get_tensor(name).dtype
    # The library tells no offsets, but the bytes that lie at ours must be the ones that it reads.
    contents = {name: bytes(said["data"]) for name, said in deserialize(file.read_bytes())}  # type: ignore[no-untyped-call]
    assert {name: bytes_of(stored) for name, stored in index.items()} == contents


def test_tensor_without_dims_is_one_element_and_an_empty_one_is_none(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(2.5), "nothing": torch.empty(3, 0)}, tmp_path / SINGLE_FILE)
    index = read_index(tmp_path)
    assert (index["scalar"].shape, index["scalar"].num_bytes) == ((), 4)
    assert struct.unpack("<f", bytes_of(index["scalar"])) == (2.5,)
    assert (index["nothing"].shape, index["nothing"].num_bytes) == ((3, 0), 0)


def test_shards_join_to_one_index(tmp_path: Path) -> None:
    names = sorted(TENSORS)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: TENSORS[name] for name in held}, tmp_path / file)
    write_shard_index(tmp_path, {name: file for file, held in shards.items() for name in held})
    index = read_index(tmp_path)
    assert {name: stored.file.name for name, stored in index.items()} == {
        name: file for file, held in shards.items() for name in held
    }
    for name, stored in index.items():
        assert bytes_of(stored) == TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes()


def test_single_file_wins_over_shards_as_in_transformers(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / SINGLE_FILE)
    save_file({"x": torch.ones(2)}, tmp_path / "old.safetensors")
    write_shard_index(tmp_path, {"x": "old.safetensors"})
    assert read_index(tmp_path)["x"].file == tmp_path / SINGLE_FILE


def test_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint folder {tmp_path / 'none'}"):
        read_index(tmp_path / "none")


def test_folder_without_a_checkpoint_is_refused_with_the_names_that_were_looked_for(tmp_path: Path) -> None:
    names = r"neither model\.safetensors nor .*, pytorch_model\.bin, .*, \.metadata nor \*\.gguf in "
    with pytest.raises(CheckpointError, match=f"{names}{tmp_path}"):
        read_index(tmp_path)


def test_safetensors_win_over_pickles_as_in_transformers(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{")
    assert read_index(tmp_path)["x"].file == tmp_path / "pytorch_model.bin"
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    write_shard_index(tmp_path, {"x": "a.safetensors"})
    assert read_index(tmp_path)["x"].file == tmp_path / "a.safetensors"


@pytest.mark.parametrize("name", [SINGLE_FILE, SHARD_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_folder_with_a_distributed_checkpoint_beside_another_is_refused_with_both(tmp_path: Path, name: str) -> None:
    for file in (name, ".metadata"):
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=rf"holds two checkpoints, {name} and .* \(\.metadata\): move one"):
        read_index(tmp_path)


def test_distributed_checkpoint_that_was_not_saved_to_the_end_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(CheckpointError, match=r"has \*\.distcp files but no \.metadata"):
        read_index(tmp_path)


def test_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "here.safetensors")
    write_shard_index(tmp_path, {"x": "here.safetensors", "y": "gone.safetensors"})
    with pytest.raises(CheckpointError, match=r"names 'gone\.safetensors', which is missing"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["{outside}/secret.safetensors", "../secret.safetensors", "sub/../x.safetensors"])
def test_shard_index_cannot_name_a_file_of_another_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"x": torch.zeros(2)}, tmp_path / "secret.safetensors")
    save_file({"x": torch.zeros(2)}, folder / "x.safetensors")
    write_shard_index(folder, {"x": name.format(outside=tmp_path)})
    with pytest.raises(CheckpointError, match="not a file of its own folder"):
        read_index(folder)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "{}",
        '{"weight_map": ["x"]}',
        '{"weight_map": {"x": ["a"]}}',
        '{"weight_map": {"x": 5, "y": "a"}}',
        '{"weight_map": {"x": 5}}',
    ],
)
def test_shard_index_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / SHARD_INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="is not a shard index"):
        read_index(tmp_path)


def test_file_that_ends_within_its_data_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_FILE
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, file)
    os.truncate(file, file.stat().st_size - 3)
    with pytest.raises(CheckpointError, match=r"is cut off: .* at least 3 more are needed for 'b'"):
        read_index(tmp_path)


@pytest.mark.parametrize("kept", [5, 8, 40])
def test_file_that_ends_within_its_header_is_cut_off(tmp_path: Path, kept: int) -> None:
    file = tmp_path / SINGLE_FILE
    save_file({"a": torch.zeros(4)}, file)
    os.truncate(file, kept)
    with pytest.raises(CheckpointError, match=f"is cut off or no safetensors file: {kept} bytes"):
        read_index(tmp_path)


def test_header_longer_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_FILE
    file.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(file, 200_000_000)  # a hole: it takes no room on the disk
    with pytest.raises(CheckpointError, match="no safetensors file: 200000000 bytes, a header of 100000001 announced"):
        read_index(tmp_path)


@pytest.mark.parametrize("header", [b"{not JSON}", b"\xff\xfe", b""])
def test_header_that_is_not_json_is_said_to_be_so(tmp_path: Path, header: bytes) -> None:
    write(tmp_path / SINGLE_FILE, header)
    with pytest.raises(CheckpointError, match="its header is not JSON"):
        read_index(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b"3", b"null"])
def test_header_that_is_no_json_object_is_refused(tmp_path: Path, header: bytes) -> None:
    write(tmp_path / SINGLE_FILE, header)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        read_index(tmp_path)


def test_bytes_that_do_not_fit_the_shape_are_shown_with_it(tmp_path: Path) -> None:
    write(tmp_path / SINGLE_FILE, entry(shape=[2, 3]), bytes(8))
    with pytest.raises(CheckpointError, match=r"'x' has shape \[2, 3\] of F32 but 8 bytes"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F6_E2M3"},
        {"dtype": ["F32"]},
        {"dtype": None},
        {"shape": 2},
        {"shape": None},
        {"data_offsets": None},
        {"data_offsets": [0]},
        {"data_offsets": [0, 8, 8]},
        {"shape": ["2"]},
        {"shape": [2.0]},
        {"shape": [-2], "data_offsets": [8, 0]},
        {"data_offsets": ["0", "8"]},
        {"data_offsets": [0.0, 8.0]},
        {"data_offsets": [-8, 0]},
    ],
)
def test_entry_that_cannot_be_read_is_shown(tmp_path: Path, changes: dict[str, object]) -> None:
    write(tmp_path / SINGLE_FILE, entry(**changes), bytes(16))
    with pytest.raises(CheckpointError, match="cannot read the entry of 'x'"):
        read_index(tmp_path)


def test_dtype_that_is_not_known_is_named_with_what_to_serve_instead(tmp_path: Path) -> None:
    write(tmp_path / SINGLE_FILE, entry(dtype="F4"), bytes(16))
    with pytest.raises(CheckpointError, match=r"'x': .*: no dtype F4 is known here; serve the checkpoint in bfloat16"):
        read_index(tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e8m0fnu])
def test_dtypes_that_no_weight_has_are_in_the_index_too(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"x": torch.ones(2, 3).to(dtype)}, tmp_path / SINGLE_FILE)
    assert read_index(tmp_path)["x"].dtype is dtype


def test_entry_that_is_no_json_object_is_shown(tmp_path: Path) -> None:
    write(tmp_path / SINGLE_FILE, {"x": [1, 2]})
    with pytest.raises(CheckpointError, match=r"cannot read the entry of 'x': \[1, 2\]"):
        read_index(tmp_path)


def save_ranks(folder: Path, parts: dict[str, tuple[list[int], torch.Tensor]]) -> None:
    """Files as torch.distributed.checkpoint.hf_storage names them, one part in each."""
    for number, (corner, tensor) in parts.items():
        info = {"DCP_SHARDING_INFO": json.dumps({"x": {"saved_offsets": corner}})}
        save_file({"x": tensor}, folder / f"shard-{number}-model-00001-of-00001.safetensors", metadata=info)


def test_parts_of_ranks_join_to_one_tensor(tmp_path: Path) -> None:
    save_ranks(tmp_path, {"00001": ([0, 0], torch.zeros(2, 3)), "00002": ([2, 0], torch.ones(1, 3))})
    (tensor,) = read_index(tmp_path).values()
    assert (tensor.shape, [part.corner for part in tensor.parts]) == ((3, 3), [(0, 0), (2, 0)])


@pytest.mark.parametrize(
    ("corner", "tensor", "message"),
    [
        ([3, 0], torch.ones(1, 3), r"'x'\[2:3\]\[0:3\] of shape \[4, 3\] is missing"),
        ([1, 0], torch.ones(2, 3), r"'x'\[1:2\]\[0:3\] of shape \[3, 3\] is there 2 times"),
        ([2], torch.ones(1, 3), "does not say where its part of 'x' begins"),
        ([2, -1], torch.ones(1, 3), "does not say which parts"),
        ([2, 0], torch.ones(1, 3).half(), "differ in dtype"),
    ],
)
def test_parts_of_ranks_that_make_up_no_tensor_are_refused(
    tmp_path: Path, corner: list[int], tensor: torch.Tensor, message: str
) -> None:
    save_ranks(tmp_path, {"00001": ([0, 0], torch.zeros(2, 3)), "00002": (corner, tensor)})
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path)


def test_shard_of_a_rank_that_does_not_say_what_it_holds_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="does not say which parts"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", [SINGLE_FILE, "pytorch_model.bin"])
def test_names_that_a_wrapper_changed_are_told_from_plain_ones(tmp_path: Path, name: str) -> None:
    for prefix, is_plain in (("", True), ("module.", False)):
        tensors = {f"{prefix}model.norm.weight": torch.ones(2), f"{prefix}lm_head.weight": torch.ones(2, 2)}
        (save_file if name == SINGLE_FILE else torch.save)(tensors, tmp_path / name)
        assert has_plain_names(tmp_path) == is_plain
