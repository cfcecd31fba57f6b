"""A rank's state: DTensors over its own memory, which torch.distributed.checkpoint saves, loads and reshards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_random_model
from places import RANKS
from programs import keep_for_ranks
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from whole_model import build_rank_model

from ts_parallel.partition.build import RankModel
from ts_parallel.partition.tensor_parallel.state import rank_state_dict
from ts_parallel.topology import Topology, open_topology

SCRIPT = RANKS / "state.py"
MODELS = {
    "llama": FAMILIES["llama"](num_hidden_layers=1, vocab_size=97),
    "gpt2": FAMILIES["gpt2"](num_hidden_layers=1, vocab_size=97),  # its fused projection is three boxes of the whole
    "one_key_value_head": FAMILIES["llama"](num_hidden_layers=1, num_key_value_heads=1),  # which both ranks keep
}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    num_threads = torch.get_num_threads()
    topology = open_topology(1, "cpu", environment={})
    yield topology
    topology.close()
    torch.set_num_threads(num_threads)


def build(folder: Path, topology: Topology) -> tuple[RankModel, dict[str, DTensor]]:
    part = build_rank_model(folder, "float32", topology.tensor_parallel, topology.device)
    return part, rank_state_dict(part.tensors, part.program.plan, topology.mesh["tp"])


def copy_and_forget(part: RankModel) -> dict[str, torch.Tensor]:
    before = {name: part.tensors[name].clone() for name in part.program.plan.parameters}
    for name in before:
        part.tensors[name].fill_(float("nan"))
    return before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_state_shares_the_parameters_memory(family: str, one_rank: Topology, tmp_path: Path) -> None:
    save_random_model(tmp_path, MODELS[family])
    part, state = build(tmp_path, one_rank)
    assert state.keys() == part.program.plan.parameters.keys()
    for name in state:
        parameter = part.tensors[name]
        assert state[name].to_local().data_ptr() == parameter.data_ptr(), name
        assert tuple(state[name].shape) == part.program.plan.parameters[name].shape
        state[name].to_local().fill_(7)
        assert torch.equal(parameter, torch.full_like(parameter, 7)), name


def test_tied_parameters_appear_once(one_rank: Topology, tmp_path: Path) -> None:
    save_random_model(tmp_path, MODELS["gpt2"])
    _, state = build(tmp_path, one_rank)
    assert "transformer.wte.weight" in state and "lm_head.weight" not in state


def test_state_is_filled_from_safetensors_as_they_are(one_rank: Topology, tmp_path: Path) -> None:
    save_random_model(tmp_path, MODELS["llama"])
    part, state = build(tmp_path, one_rank)
    before = copy_and_forget(part)
    load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    for name, tensor in before.items():
        assert torch.equal(part.tensors[name], tensor), name


@pytest.fixture(scope="module")
def folders(one_rank: Topology, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model's checkpoint, its state saved by one rank, and what two ranks made of both: see the script."""
    root = tmp_path_factory.mktemp("state")
    folders = {name: root / name for name in MODELS}
    for name, folder in folders.items():
        save_random_model(folder / "model", MODELS[name])
        keep_for_ranks(folder / "model", {"dtype": "float32", "tensor_parallel_size": 2})
        save(build(folder / "model", one_rank)[1], checkpoint_id=folder / "of_one_rank")
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "TMPDIR": str(root), "OMP_NUM_THREADS": "1"}
    command = [*ranks, str(SCRIPT), *map(str, folders.values())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 0, result.stderr
    return folders


@pytest.mark.ranks
@pytest.mark.parametrize("name", MODELS)
def test_state_of_two_ranks_is_loaded_into_one(name: str, folders: dict[str, Path], one_rank: Topology) -> None:
    part, state = build(folders[name] / "model", one_rank)
    before = copy_and_forget(part)
    load(state, checkpoint_id=folders[name] / "of_all_ranks")
    for key, tensor in before.items():
        assert torch.equal(part.tensors[key], tensor), key


@pytest.mark.ranks
@pytest.mark.parametrize("name", MODELS)
def test_state_of_one_rank_is_loaded_into_two(name: str, folders: dict[str, Path], one_rank: Topology) -> None:
    part, _ = build(folders[name] / "model", one_rank)
    for rank in range(2):
        equal = json.loads((folders[name] / f"equal-{rank}.json").read_text())
        assert equal == dict.fromkeys(part.program.plan.parameters, True)
