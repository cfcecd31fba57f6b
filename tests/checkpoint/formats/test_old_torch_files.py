"""Files of torch before 1.6 are read as those after it: each tensor where it lies, and nothing that a pickle names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from malicious import Malicious
from torch import nn

from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.stored import Slice
from ts_parallel.errors import CheckpointError

FILE = "pytorch_model.bin"


def save(folder: Path, content: object, protocol: int = 2) -> Path:
    torch.save(content, folder / FILE, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    return folder / FILE


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    index = read_index(folder)
    targets = {name: torch.empty(source.shape, dtype=source.dtype) for name, source in index.items()}
    load_tensors(
        [LoadItem(targets[name], source, None) for name, source in index.items()], Progress("", is_shown=False)
    )
    return targets


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_tensors_are_loaded_as_they_were_saved(tmp_path: Path, protocol: int) -> None:
    whole = torch.rand(6, 4)
    tensors = {
        "double": torch.rand(3, 5, dtype=torch.float64),
        "brain": torch.rand(7).bfloat16(),
        "long": torch.arange(5),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
        "parameter": nn.Parameter(torch.rand(2)),
        **{"whole": whole, "rows": whole[2:5], "tied": whole},
    }
    save(tmp_path, tensors, protocol)
    found = loaded(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_rank_reads_its_rows(tmp_path: Path) -> None:
    weights = {f"weight {number}": torch.rand(8, 3) for number in range(3)}
    save(tmp_path, {"state_dict": weights, "epoch": 3})
    source = read_index(tmp_path)["weight 1"]
    target = torch.empty(2, 3)
    load_tensors([LoadItem(target, source, Slice(0, ((5, 2),)))], Progress("", is_shown=False))
    assert torch.equal(target, weights["weight 1"][5:7])


def test_file_that_ends_within_its_storages_or_pickles_is_said_to_be_cut_off(tmp_path: Path) -> None:
    file = save(tmp_path, {"a": torch.rand(4), "b": torch.rand(100)})
    size = file.stat().st_size
    for kept, message in ((size - 1, "is cut off: .* at least 1 more"), (size - 410, "is cut off"), (60, "is damaged")):
        os.truncate(file, kept)
        with pytest.raises(CheckpointError, match=message):
            read_index(tmp_path)


def test_count_of_a_storage_that_does_not_fit_is_damage(tmp_path: Path) -> None:
    file = save(tmp_path, {"a": torch.zeros(4)})
    content = file.read_bytes()
    file.write_bytes(content[:-24] + (5).to_bytes(8, "little") + content[-16:])
    with pytest.raises(CheckpointError, match="is damaged: a storage of 5 elements, 4 are needed"):
        read_index(tmp_path)


def test_pickle_that_calls_anything_is_refused_and_nothing_is_called(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(3), "y": Malicious(os.system, f"touch {tmp_path / 'was-run'}")})
    with pytest.raises(CheckpointError, match="system, which is not read from a pickle and was not run"):
        read_index(tmp_path)
    assert not (tmp_path / "was-run").exists()
