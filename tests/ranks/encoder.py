"""Ranks that run encoders they share: `encoder.py FOLDER…`, each with a model and, in `inputs.pt`, task and inputs.

Every rank writes what its part of the model gives to `output-RANK.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ts_parallel.checkpoint.index import read_index
from ts_parallel.partition.load import load_program
from ts_parallel.partition.prepared import prepare_program
from ts_parallel.partition.program import ProgramRequest
from ts_parallel.runtime.backends.torch.backend import TorchBackend
from ts_parallel.runtime.stage import Stage
from ts_parallel.serving.offline import num_ranks_started
from ts_parallel.topology import Topology, open_topology


@torch.inference_mode()
def run(folder: Path, topology: Topology) -> None:
    task, inputs = torch.load(folder / "inputs.pt", weights_only=True)
    group, index = topology.tensor_parallel, read_index(folder)
    program = prepare_program(ProgramRequest(folder, "float32", group.rank, group.size, task=task), index)
    part = load_program(program, index, group, topology.device)
    (output,) = Stage(program.stages[0], part.tensors, group, TorchBackend())(None, inputs)
    torch.save(output, folder / f"output-{topology.rank}.pt")


def main(folders: list[Path]) -> None:
    topology = open_topology(num_ranks_started(), "cpu", num_threads=1)
    for folder in folders:
        run(folder, topology)
    topology.close()


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
