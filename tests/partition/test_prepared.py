"""A rank's program comes from a file that a process of its own has made, once for all that share it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_random_model
from programs import OWN_PROCESS

from ts_parallel.checkpoint.index import read_index
from ts_parallel.errors import CheckpointError, PlanError
from ts_parallel.partition import prepared
from ts_parallel.partition.build import make_programs
from ts_parallel.partition.load import load_program
from ts_parallel.partition.prepared import CACHE_VARIABLE, prepare_program
from ts_parallel.partition.program import PipelinePlace, ProgramRequest, RankProgram
from ts_parallel.topology import TensorParallelGroup


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "programs"))
    return tmp_path / "programs"


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are made as they are outside tests."""
    monkeypatch.setattr(prepared, "_make", OWN_PROCESS)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[ProgramRequest]:
    """What programs were made for."""
    requests: list[ProgramRequest] = []
    make = prepared._make

    def noted(request: ProgramRequest) -> prepared.Pickles:
        requests.append(request)
        return make(request)

    monkeypatch.setattr(prepared, "_make", noted)
    return requests


def programs_in(cache: Path) -> list[str]:
    return sorted(file.name for file in cache.iterdir() if file.suffix != ".lock")


def save(folder: Path, family: str = "llama", **changes: Any) -> ProgramRequest:
    save_random_model(folder, FAMILIES[family](num_hidden_layers=2, **changes))
    return ProgramRequest(folder, "float32", 0, 1)


def prepare(request: ProgramRequest) -> RankProgram:
    return prepare_program(request, read_index(request.folder))


def assert_same(one: RankProgram, other: RankProgram) -> None:
    assert one.plan == other.plan and one.whole_plan == other.whole_plan and one.sources == other.sources
    assert [stage.source for stage in one.stages] == [stage.source for stage in other.stages]
    assert one.buffers.keys() == other.buffers.keys()
    for name, buffer in one.buffers.items():
        assert torch.equal(buffer, other.buffers[name]), name


@pytest.mark.usefixtures("own_process")
def test_program_of_the_file_is_the_one_that_is_made_here(cache: Path, tmp_path: Path) -> None:
    request = replace(save(tmp_path / "model"), rank=1, size=2, place=PipelinePlace(1, 2))
    found = prepare(request)
    assert_same(found, make_programs(request, read_index(request.folder))[1, 1])
    group = TensorParallelGroup(1, 2)
    tensors = load_program(found, read_index(request.folder), group, torch.device("cpu")).tensors
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.usefixtures("own_process")
def test_ranks_of_a_host_make_it_once_and_later_starts_never(
    cache: Path, tmp_path: Path, made: list[ProgramRequest]
) -> None:
    request = replace(save(tmp_path / "model"), size=2)
    places = [replace(request, rank=rank, place=PipelinePlace(place, 2)) for rank in range(2) for place in range(2)]
    with ThreadPoolExecutor(4) as ranks:
        programs = list(ranks.map(prepare, places))
    assert len(made) == 1
    assert programs[0].plan.parameters.keys() != programs[1].plan.parameters.keys()
    assert_same(programs[1], programs[3])
    assert_same(prepare(places[1]), programs[1])
    assert len(made) == 1


def test_same_model_in_another_folder_is_found_and_read_there(
    cache: Path, tmp_path: Path, made: list[ProgramRequest]
) -> None:
    """As TorchServe unpacks an archive into a new folder at every start."""
    prepare(save(tmp_path / "one"))
    request = save(tmp_path / "other")
    index = read_index(request.folder)
    found = load_program(prepare(request), index, TensorParallelGroup(0, 1), torch.device("cpu"))
    assert len(made) == 1
    for name, tensor in index.items():
        expected = torch.frombuffer(bytearray(tensor.file.read_bytes()), dtype=torch.uint8)
        stored = expected[tensor.offset : tensor.offset + tensor.num_bytes].view(torch.float32).view(tensor.shape)
        assert torch.equal(found.tensors[name], stored), name


def test_whatever_changes_the_program_has_another_file(cache: Path, tmp_path: Path, made: list[ProgramRequest]) -> None:
    request = save(tmp_path / "model")
    prepare(request)
    for changed in (
        replace(request, dtype="bfloat16"),
        replace(request, size=2),
        replace(request, place=PipelinePlace(0, 2, split_points=(1,))),
        save(tmp_path / "eps", rms_norm_eps=1e-3),
        save(tmp_path / "tied", tie_word_embeddings=True),
    ):
        prepare(changed)
    assert len(made) == 6
    assert len({name[:32] for name in programs_in(cache)}) == 6


def test_settings_of_another_folder_and_whole_experts_have_another_file(tmp_path: Path) -> None:
    request = save(tmp_path / "model", "mixtral")
    index = read_index(request.folder)
    other = save(tmp_path / "other", "mixtral", rms_norm_eps=1e-3).folder
    requests = [request, replace(request, settings=other), replace(request, expert_parallel=True)]
    digests = [prepared._digest(each, index) for each in requests]
    assert len(set(digests)) == 3
    assert prepared._digest(replace(request, settings=request.folder), index) == digests[0]
    shutil.copytree(other, tmp_path / "moved")
    assert prepared._digest(replace(request, settings=tmp_path / "moved"), index) == digests[1]


@pytest.mark.usefixtures("own_process")
def test_refusals_are_those_of_the_process_that_makes_it_and_leave_nothing(cache: Path, tmp_path: Path) -> None:
    request = save(tmp_path / "model")
    with pytest.raises(PlanError, match="tensor_parallel_size must be one of"):
        prepare(replace(request, size=5))
    config = request.folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "zork"}))
    with pytest.raises(CheckpointError, match="zork"):
        prepare(request)
    assert programs_in(cache) == []


@pytest.mark.usefixtures("own_process")
def test_process_that_dies_is_told_of_with_its_status(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = save(tmp_path / "model")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(PlanError, match="the process that traces the model ended with status 1"):
        prepare(request)


@pytest.mark.usefixtures("own_process")
def test_file_of_the_working_directory_is_not_taken_for_a_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers.py").write_text("raise SystemExit('the wrong one')")
    request = save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert prepare(request).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("is_shared", [False, True])
def test_folder_that_is_not_ones_own_is_done_without(
    is_shared: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: list[ProgramRequest],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It cannot be written, or others may write there too."""
    folder = tmp_path / "programs"
    if is_shared:
        folder.mkdir(mode=0o700)
        folder.chmod(0o777)
    else:
        folder.write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    request = save(tmp_path / "model")
    assert [prepare(request).architecture for _ in range(2)] == ["LlamaForCausalLM"] * 2
    assert len(made) == 2
    assert not is_shared or programs_in(folder) == []
    assert f"not kept: {f'others may write to {folder}' if is_shared else '[Errno 17]'}" in caplog.text


def test_disk_that_is_full_costs_the_next_start_time_and_no_more(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(content[:10])
        raise OSError(28, "No space left on device")

    request = save(tmp_path / "model")
    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_bytes", full)
        assert prepare(request).architecture == "LlamaForCausalLM"
    assert "No space left on device" in caplog.text
    assert programs_in(cache) == []


@pytest.mark.parametrize("content", [b"", b"torn", pickle.dumps("something else")])
def test_file_that_cannot_be_read_is_made_again(
    content: bytes, cache: Path, tmp_path: Path, made: list[ProgramRequest]
) -> None:
    request = save(tmp_path / "model")
    program = prepare(request)
    (name,) = programs_in(cache)
    (cache / name).write_bytes(content)
    assert_same(prepare(request), program)
    assert_same(prepare(request), program)
    assert len(made) == 2


def test_files_that_were_not_used_for_longest_are_forgotten(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But never those that were just made, however many they are."""
    monkeypatch.setattr(prepared, "_MOST_FILES", 3)
    request = save(tmp_path / "used")
    used = prepare(request)
    for number in range(5):
        (cache / f"old-{number}").write_text("")
        os.utime(cache / f"old-{number}", (number, number))
    (kept,) = [name for name in programs_in(cache) if not name.startswith("old")]
    os.utime(cache / kept, (1, 1))
    assert_same(prepare(request), used)  # and so it is the latest
    prepare(replace(save(tmp_path / "new", rms_norm_eps=1e-3), size=2, place=PipelinePlace(0, 2)))
    assert kept in programs_in(cache)
    assert len([name for name in programs_in(cache) if name != kept and not name.startswith("old")]) == 4
    assert len([name for name in programs_in(cache) if name.startswith("old")]) <= 2


def test_who_runs_a_program_imports_neither_transformers_nor_the_tracer(cache: Path, tmp_path: Path) -> None:
    request = replace(save(tmp_path / "model"), place=PipelinePlace(1, 2))
    file = tmp_path / "request"
    file.write_bytes(pickle.dumps(request))
    code = f"""
import pickle, sys
from pathlib import Path
from ts_parallel.serving import causal_lm as serving, text_generation
from ts_parallel.runtime.backends.torch.backend import TorchBackend
from ts_parallel.runtime.stage import Stage
from ts_parallel.topology import open_topology
request = pickle.loads(Path({str(file)!r}).read_bytes())
topology = open_topology(1, "cpu")
index = serving.read_index(request.folder)
program = serving.prepare_program(request, index)
part = serving.load_program(program, index, topology.tensor_parallel, topology.device)
Stage(program.stages[0], part.tensors, topology.tensor_parallel, TorchBackend())
print(sorted({{"transformers", "torch.export._trace", "torch.distributed.tensor"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == "[]\n"
