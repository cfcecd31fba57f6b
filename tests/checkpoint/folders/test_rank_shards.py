"""What the ranks of an FSDP job each saved, as verl does, is the whole of it; DTensors are read as data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from malicious import Malicious
from places import RANKS

from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.checkpoint.stored import Slice
from ts_parallel.errors import CheckpointError

WHOLE = {
    "model.layers.0.weight": torch.rand(7, 3),
    "model.layers.1.columns.weight": torch.rand(3, 9).bfloat16(),
    "model.layers.2.short": torch.rand(1, 4),
    "model.whole": torch.rand(5),
    "model.scalar": torch.tensor(2.5),
}


def save(folder: Path, num_ranks: int, rows: int, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "whole.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += [str(RANKS / "save_rank_files.py"), str(folder), str(rows)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "whole.pt").unlink()
    return folder


@pytest.fixture(scope="module", params=[(2, 1), (4, 2)], ids=["one row", "two rows"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    num_ranks, rows = request.param
    return save(tmp_path_factory.mktemp("ranks"), num_ranks, rows, WHOLE)


@pytest.mark.ranks
def test_parts_of_the_ranks_are_the_whole(saved: Path) -> None:
    index = read_index(saved)
    targets = {name: torch.empty(source.shape, dtype=source.dtype) for name, source in index.items()}
    items = [LoadItem(targets[name], source, None) for name, source in index.items()]
    load_tensors(items, Progress("", is_shown=False))
    assert targets.keys() == WHOLE.keys()
    for name, tensor in WHOLE.items():
        assert targets[name].dtype == tensor.dtype and torch.equal(targets[name], tensor), name


@pytest.mark.ranks
def test_rank_reads_its_rows_over_the_border_of_two_files(saved: Path) -> None:
    name = "model.layers.0.weight"
    target = torch.empty(4, 3)
    load_tensors([LoadItem(target, read_index(saved)[name], Slice(0, ((2, 4),)))], Progress("", is_shown=False))
    assert torch.equal(target, WHOLE[name][2:6])


@pytest.mark.ranks
def test_rank_whose_file_is_missing_is_missed(saved: Path, tmp_path: Path) -> None:
    for file in sorted(saved.glob("*.pt"))[1:]:
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=r"files such as model_world_size_.*: not one of each rank"):
        read_index(tmp_path)


@pytest.mark.ranks
def test_tensor_that_is_cut_along_both_axes_of_a_mesh_is_refused_with_what_merges_it(tmp_path: Path) -> None:
    save(tmp_path, 4, 2, {"model.both.weight": torch.rand(8, 3)})
    with pytest.raises(CheckpointError, match=r"does not lie over one row of ranks, .*`python -m verl\.model_merger"):
        read_index(tmp_path)


def test_pickle_that_calls_anything_is_refused_and_nothing_is_called(tmp_path: Path) -> None:
    content = {"x": torch.ones(3), "y": Malicious(os.system, f"touch {tmp_path / 'was-run'}")}
    torch.save(content, tmp_path / "model_world_size_1_rank_0.pt")
    with pytest.raises(CheckpointError, match="system, which is not read from a pickle and was not run"):
        read_index(tmp_path)
    assert not (tmp_path / "was-run").exists()


def test_configuration_that_verl_leaves_beside_the_ranks_is_found(tmp_path: Path) -> None:
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "config.json").touch()
    assert settings_folder(tmp_path) == tmp_path / "huggingface"
