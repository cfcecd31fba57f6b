"""What the ranks of a training job saved is loaded into other shards and stages as the model's safetensors are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_random_model
from places import RANKS

from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.stored import Slice
from ts_parallel.partition.build import make_programs
from ts_parallel.partition.load import load_program
from ts_parallel.partition.program import PipelinePlace, ProgramRequest
from ts_parallel.topology import TensorParallelGroup

SCRIPT = RANKS / "save_distributed.py"
CPU = torch.device("cpu")
SILENT = Progress("weights", is_shown=False)
# Neither the vocabulary nor the MLP divides into three or four equal parts; the heads do into two and three.
HEADS = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6}
CONFIG = FAMILIES["llama"](num_hidden_layers=2, vocab_size=97, intermediate_size=130, **HEADS)
WRITERS = ["fsdp", "tp", "safetensors"]
SHAPES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` and what four ranks saved of it, as the script says, with the configuration where trainers have it."""
    root = tmp_path_factory.mktemp("trained")
    save_random_model(root / "model", CONFIG)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = {**os.environ, "TMPDIR": str(root), "OMP_NUM_THREADS": "1"}
    command = [*ranks, str(SCRIPT), str(root)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr
    shutil.copy(root / "model" / "config.json", root)  # beside `fsdp` and `tp`
    shutil.copy(root / "model" / "config.json", root / "safetensors")
    return root


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "num_stages"), SHAPES)
def test_every_rank_has_the_tensors_that_it_has_from_safetensors(folder: Path, size: int, num_stages: int) -> None:
    plain, trained = read_index(folder / "model"), {writer: read_index(folder / writer) for writer in WRITERS}
    place = PipelinePlace(0, num_stages)
    programs = make_programs(ProgramRequest(folder / "fsdp", "float32", 0, size, place), trained["fsdp"])
    assert len(programs) == size * num_stages
    for (rank, stage), program in programs.items():
        group = TensorParallelGroup(rank, size)
        expected = load_program(program, plain, group, CPU).tensors
        for writer, index in trained.items():
            found = load_program(program, index, group, CPU).tensors
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name]), (writer, rank, stage, name)


@pytest.mark.ranks
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("dim", [0, -1])
def test_shards_are_converted_to_another_dtype_while_they_are_read(folder: Path, writer: str, dim: int) -> None:
    plain, trained = read_index(folder / "model"), read_index(folder / writer)
    for name, source in plain.items():
        kept = Slice(dim % len(source.shape), ((3, 10), (20, 7)))
        shape = torch.empty(source.shape).narrow(dim, 0, kept.length).shape
        expected, found = torch.empty(2, *shape, dtype=torch.bfloat16)
        load_tensors([LoadItem(expected, source, kept), LoadItem(found, trained[name], kept)], SILENT)
        assert torch.equal(found, expected), name


@pytest.mark.ranks
def test_index_has_the_model_alone_and_each_of_its_tensors_in_the_parts_that_ranks_had(folder: Path) -> None:
    names = set(read_index(folder / "model"))
    fsdp, tp, both = (read_index(folder / writer) for writer in WRITERS)
    assert set(fsdp) == names | {"five_rows"}
    assert set(tp) == set(both) == names
    assert [part.shape for part in fsdp["lm_head.weight"].parts] == [(25, 96), (25, 96), (25, 96), (22, 96)]
    assert [part.shape for part in tp["lm_head.weight"].parts] == [(49, 96), (48, 96)]
    assert [part.corner for part in tp["model.layers.0.mlp.down_proj.weight"].parts] == [(0, 0), (0, 65)]
    assert len(both["model.layers.0.mlp.down_proj.weight"].parts) == 4


@pytest.mark.ranks
def test_rank_that_had_nothing_of_a_tensor_leaves_no_gap(folder: Path) -> None:
    source = read_index(folder / "fsdp")["five_rows"]
    assert [part.shape for part in source.parts] == [(2,), (2,), (1,)]
    target = torch.empty(5)
    load_tensors([LoadItem(target, source, None)], SILENT)
    assert torch.equal(target, torch.arange(5.0))
