"""A file of torch.save is an index too: each tensor's bytes are found, and nothing that the file names is run."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from malicious import Malicious
from torch import nn

from ts_parallel.checkpoint.index import CheckpointIndex, read_index
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.errors import CheckpointError

SILENT = Progress("weights", is_shown=False)
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.complex64),
]


def save(folder: Path, content: object, name: str = "pytorch_model.bin", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def loaded(index: CheckpointIndex) -> dict[str, torch.Tensor]:
    targets = {name: torch.empty(source.shape, dtype=source.dtype) for name, source in index.items()}
    load_tensors([LoadItem(targets[name], source, None) for name, source in index.items()], SILENT)
    return targets


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        bytes_of = [own.detach().contiguous().reshape(-1).view(torch.uint8) for own in (found[name], tensor)]
        assert found[name].shape == tensor.shape and torch.equal(*bytes_of), name


def test_every_dtype_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    tensors = {str(dtype): (8 * torch.rand(3, 5)).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "nothing": torch.empty(0, 4), "parameter": nn.Parameter(torch.rand(2))}
    save(tmp_path, tensors)
    assert_same(loaded(read_index(tmp_path)), tensors)


def test_state_dict_of_a_module_is_read_with_the_note_that_torch_hangs_on_it(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    save(tmp_path, module.state_dict())
    assert_same(loaded(read_index(tmp_path)), dict(module.state_dict()))


def test_views_and_tied_tensors_are_found_in_the_storage_that_they_share(tmp_path: Path) -> None:
    whole = torch.rand(6, 4)
    tensors = {"whole": whole, "rows": whole[2:5], "row": whole[5], "tied": whole, "one_column": whole[:, :1][3:4]}
    save(tmp_path, tensors)
    index = read_index(tmp_path)
    assert_same(loaded(index), tensors)
    assert index["tied"].offset == index["whole"].offset
    assert index["rows"].offset == index["whole"].offset + 2 * 4 * 4


@pytest.mark.parametrize("view", [torch.rand(6, 4).t(), torch.rand(6, 4)[:, 1:3], torch.rand(4).expand(3, 4)])
def test_tensor_that_does_not_lie_row_by_row_is_refused_with_its_strides(tmp_path: Path, view: torch.Tensor) -> None:
    save(tmp_path, {"x": view})
    message = f"with strides {list(view.stride())}: call .contiguous() on it before saving"
    with pytest.raises(CheckpointError, match=rf"'x' of shape .* lies in .* {re.escape(message)}"):
        read_index(tmp_path)


def test_shards_join_to_one_index(tmp_path: Path) -> None:
    tensors = {name: torch.rand(2, 3) for name in "abcd"}
    files = {"a": "one.bin", "c": "one.bin", "b": "two.bin", "d": "two.bin"}
    for file in set(files.values()):
        save(tmp_path, {name: tensors[name] for name, own in files.items() if own == file}, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same(loaded(read_index(tmp_path)), tensors)
    (tmp_path / "two.bin").unlink()
    with pytest.raises(CheckpointError, match=r"names 'two\.bin', which is missing"):
        read_index(tmp_path)


@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_model_is_found_in_what_a_trainer_saves(tmp_path: Path, key: str) -> None:
    model = nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    training = {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "epoch": 3, "betas": (1, 2)}
    save(tmp_path, {key: model.state_dict(), **training})
    assert_same(loaded(read_index(tmp_path)), dict(model.state_dict()))


def test_file_of_protocol_4_is_read(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(3)}, pickle_protocol=4)
    assert_same(loaded(read_index(tmp_path)), {"x": torch.ones(3)})


def test_other_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a zip file")
    with pytest.raises(CheckpointError, match=r"is not in torch\.save's zip format, nor in its older one: .* save"):
        read_index(tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("function", [os.system, eval, getattr, pickle.loads, torch.load, torch.hub.load, type])
def test_pickle_that_calls_anything_is_refused_and_nothing_is_called(
    tmp_path: Path, function: Callable[..., object], protocol: int
) -> None:
    evil = Malicious(function, f"touch {tmp_path / 'was-run'}")
    save(tmp_path, {"x": torch.ones(3), "y": evil}, pickle_protocol=protocol)
    with pytest.raises(
        CheckpointError, match=rf"holds a .*{function.__name__}, which is not read from a pickle and was"
    ):
        read_index(tmp_path)
    assert not (tmp_path / "was-run").exists()


def rewrite(file: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def pickled_by(code: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, content: code if name.endswith("data.pkl") else content


@pytest.mark.parametrize(
    "code",
    [
        b"ctorch\n_utils._rebuild_tensor_v2.__globals__\n.",  # an attribute of what is allowed
        b"ctorch\nload\n.",
        b"ctorch\nfloat32.__class__\n.",
        b"cposix\nsystem\n(X\x04\x00\x00\x00truetR.",
    ],
)
def test_pickle_that_reaches_for_more_than_a_name_of_the_list_is_refused(tmp_path: Path, code: bytes) -> None:
    rewrite(save(tmp_path, {"x": torch.ones(3)}), pickled_by(code))
    with pytest.raises(CheckpointError, match="which is not read from a pickle"):
        read_index(tmp_path)


@pytest.mark.parametrize("code", [b"", b"garbage", b"\x80\x02}q\x00X\x01\x00\x00\x00xK\x05", pickle.dumps({})[:-1]])
def test_torn_pickle_is_damaged(tmp_path: Path, code: bytes) -> None:
    rewrite(save(tmp_path, {"x": torch.ones(3)}), pickled_by(code))
    with pytest.raises(CheckpointError, match="is damaged: its pickle cannot be read"):
        read_index(tmp_path)


def test_what_is_no_dict_is_refused(tmp_path: Path) -> None:
    save(tmp_path, [torch.ones(3)])
    with pytest.raises(CheckpointError, match="holds no dict of tensors"):
        read_index(tmp_path)


def test_dict_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, object] = {"x": torch.ones(3)}
    content["self"] = content
    save(tmp_path, content)
    with pytest.raises(CheckpointError, match="dicts in dicts"):
        read_index(tmp_path)


def test_storages_are_found_where_the_archive_has_them_in_whatever_order(tmp_path: Path) -> None:
    """torch itself counts where they should be."""
    tensors = {"a": torch.rand(3), "b": torch.rand(4)}
    file = save(tmp_path, tensors)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name in sorted(records, reverse=True):
            archive.writestr(name, records[name])
    assert_same(loaded(read_index(tmp_path)), tensors)


def test_storage_of_another_length_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, {"x": torch.ones(3)})
    rewrite(file, lambda name, content: content[:-4] if name.endswith("data/0") else content)
    with pytest.raises(CheckpointError, match=r"is damaged: .* has 8 bytes, not 12"):
        read_index(tmp_path)


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    rewrite(save(tmp_path, {"x": torch.ones(3)}), lambda _, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        read_index(tmp_path)


def test_other_byte_order_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, {"x": torch.ones(3)})
    rewrite(file, lambda name, content: b"big" if name.endswith("byteorder") else content)
    with pytest.raises(CheckpointError, match="big-endian"):
        read_index(tmp_path)


@pytest.mark.parametrize("removed", [1, 30, 700, 1000])
def test_file_that_was_cut_off_is_said_to_be_so(tmp_path: Path, removed: int) -> None:
    file = save(tmp_path, {"x": torch.ones(300)})
    os.truncate(file, file.stat().st_size - removed)
    with pytest.raises(CheckpointError, match="is cut off or damaged"):
        read_index(tmp_path)


def test_byte_that_was_changed_in_the_pickle_is_noticed(tmp_path: Path) -> None:
    file = save(tmp_path, {"name": torch.ones(3)})
    content = file.read_bytes()
    file.write_bytes(content.replace(b"name", b"game", 1))
    with pytest.raises(CheckpointError, match="another checksum"):
        read_index(tmp_path)


def test_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    size = b"K\x03\x85"  # the tuple (3,)
    rewrite(save(tmp_path, {"x": torch.ones(3)}), lambda _, content: content.replace(size, b"K\x04\x85"))
    with pytest.raises(CheckpointError, match=r"a tensor of shape \(4,\) in a storage of 12 bytes"):
        read_index(tmp_path)
