"""Two ranks that answer as encoder–decoder models, sharing layers or dealing them out: `seq2seq.py FOLDER…`.

Each folder has a `requests.json`, and pickled programs of the shapes that it is to run in. Rank 0 writes the answers in
each shape to `answers.json`.
"""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.device_mesh import init_device_mesh

from ts_parallel.checkpoint.index import read_index
from ts_parallel.config import Seq2SeqConfig
from ts_parallel.runtime.batch.part_runner import PartRunner
from ts_parallel.serving.batch.micro_batching import MicroBatcher
from ts_parallel.serving.batch.seq2seq import answer_runner, make_seq2seq_task, run_program
from ts_parallel.serving.exchange import RawRequest
from ts_parallel.topology import Topology, open_tensor_parallel, open_topology

SHAPES = ((2, 1), (1, 2))
"""Tensor-parallel ranks and pipeline ranks."""


def program_file(folder: Path, size: int, num_stages: int, stage: int) -> Path:
    """Tensor-parallel ranks share one: theirs are of the same shape."""
    return folder / f"program-{size}-{num_stages}-{stage}.pickle"


def answers_of(runner: PartRunner, folder: Path) -> list[Any]:
    """Rank 0: two items a micro-batch, three micro-batches under way at once; then one that is alone."""
    task_name, requests = json.loads((folder / "requests.json").read_text())
    task, rules = make_seq2seq_task(Seq2SeqConfig(model_path=str(folder), task=task_name), folder)
    batcher = MicroBatcher(
        answer_runner(runner, rules),
        lambda body: task.preprocess(RawRequest("", body, "application/json")),
        lambda _, output: task.postprocess(output)["token_ids"],
        2,
        collator=task.collator,
    )
    answers = batcher.run(requests)
    runner.sign_of_life()
    assert batcher.run(requests[:1]) == answers[:1]
    assert not runner._kept, "what is done with is kept"
    batcher.close()
    return answers


def run(folder: Path, size: int, topology: Topology) -> list[Any]:
    file = program_file(folder, size, topology.num_stages, topology.stage)
    runner = run_program(pickle.loads(file.read_bytes()), read_index(folder), topology)
    if topology.rank:
        runner.follow()
        assert not runner._kept, "what is done with is kept"
        return []
    answers = answers_of(runner, folder)
    runner.stop_followers()
    return answers


def main(folders: list[Path]) -> None:
    answers: dict[Path, dict[str, list[Any]]] = {folder: {} for folder in folders}
    whole = open_topology(2, "cpu", num_threads=1)
    for size, num_stages in SHAPES:
        mesh = init_device_mesh("cpu", (num_stages, size), mesh_dim_names=("pp", "tp"))
        topology = replace(whole, mesh=mesh, tensor_parallel=open_tensor_parallel(mesh))
        for folder in folders:
            if program_file(folder, size, num_stages, 0).is_file():
                answers[folder][f"{size} × {num_stages}"] = run(folder, size, topology)
    whole.close()
    if whole.rank == 0:
        for folder in folders:
            (folder / "answers.json").write_text(json.dumps(answers[folder]))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
