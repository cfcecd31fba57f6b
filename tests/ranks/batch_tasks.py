"""Two ranks that answer tasks of batch inference, sharing layers or dealing them out: `batch_tasks.py FOLDER…`.

Each folder has an `asked.json`: its task, the bodies, and the shapes that it is to run in. Rank 0 writes the answers in
each shape to `answers.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.device_mesh import init_device_mesh

from ts_parallel.config import BatchConfig
from ts_parallel.partition.model.sentence_modules import transformer_folder
from ts_parallel.runtime.batch.batch_runner import BatchRunner
from ts_parallel.serving.batch.jobs import Job, Work
from ts_parallel.serving.batch.micro_batching import MicroBatcher
from ts_parallel.serving.batch.tasks import Task, make_task
from ts_parallel.serving.batch_inference import make_batch_runner
from ts_parallel.serving.exchange import JSON, RawRequest
from ts_parallel.topology import Topology, open_tensor_parallel, open_topology


def answers_of(runner: BatchRunner, task: Task, bodies: Sequence[Any]) -> list[Any]:
    """Rank 0: two items a micro-batch."""
    answers: dict[int, Any] = {}
    jobs = []
    for number, body in enumerate(bodies):
        item = RawRequest("", body, JSON)
        own = Work([partial(task.preprocess, item)], lambda done: task.postprocess(done[0].output))
        jobs.append(Job(task.open(item) or own, partial(answers.__setitem__, number)))
    batcher = MicroBatcher(
        runner, lambda part: part.prepare(), lambda part, output: part.take(output), 2, collator=task.collator
    )
    outcomes = batcher.run([part for job in jobs for part in job.parts])
    batcher.close()
    assert not any(isinstance(outcome, Exception) for outcome in outcomes), outcomes
    return [answers[number] for number in range(len(bodies))]


def run(folder: Path, task_name: str, bodies: Sequence[Any], topology: Topology) -> list[Any]:
    own = transformer_folder(folder)
    sizes = {"tensor_parallel_size": topology.tensor_parallel.size, "pipeline_parallel_size": topology.num_stages}
    config = BatchConfig(model_path=str(folder), task=task_name, device="cpu", **sizes)  # type: ignore[arg-type]
    runner = make_batch_runner(config, own, topology)
    if topology.rank:
        runner.follow()
        return []
    answers = answers_of(runner, make_task(task_name, own, "auto"), bodies)
    runner.stop_followers()
    return answers


def main(folders: list[Path]) -> None:
    asked = {folder: json.loads((folder / "asked.json").read_text()) for folder in folders}
    answers: dict[Path, dict[str, list[Any]]] = {folder: {} for folder in folders}
    whole = open_topology(2, "cpu", num_threads=1)
    for size, num_stages in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", (num_stages, size), mesh_dim_names=("pp", "tp"))
        topology = replace(whole, mesh=mesh, tensor_parallel=open_tensor_parallel(mesh))
        for folder, (task_name, bodies, shapes) in asked.items():
            if [size, num_stages] in shapes:
                answers[folder][f"{size} × {num_stages}"] = run(folder, task_name, bodies, topology)
    whole.close()
    if whole.rank == 0:
        for folder in folders:
            (folder / "answers.json").write_text(json.dumps(answers[folder]))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
