"""Ranks that save their state and load another's: `state.py FOLDER…`, each with a model, and a state of one rank.

Every FOLDER holds `model`, a checkpoint, and `of_one_rank`, a torch.distributed.checkpoint. `of_all_ranks` is written
beside them, and by each rank `equal-RANK.json`: parameter name → whether it came back from `of_one_rank` as it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ts_parallel.checkpoint.index import read_index
from ts_parallel.partition.load import load_program
from ts_parallel.partition.prepared import prepare_program
from ts_parallel.partition.program import ProgramRequest
from ts_parallel.partition.tensor_parallel.state import rank_state_dict
from ts_parallel.topology import Topology, open_topology


def save_and_load(folder: Path, topology: Topology) -> None:
    group, index = topology.tensor_parallel, read_index(folder / "model")
    program = prepare_program(ProgramRequest(folder / "model", "float32", group.rank, group.size), index)
    part = load_program(program, index, group, topology.device)
    state = rank_state_dict(part.tensors, part.program.plan, topology.mesh["tp"])
    save(state, checkpoint_id=folder / "of_all_ranks")
    parameters = part.tensors
    before = {name: parameters[name].clone() for name in state}
    for name in state:
        parameters[name].fill_(float("nan"))
    load(state, checkpoint_id=folder / "of_one_rank")
    equal = {name: torch.equal(parameters[name], before[name]) for name in state}
    (folder / f"equal-{topology.rank}.json").write_text(json.dumps(equal))


def main(folders: list[Path]) -> None:
    topology = open_topology(2, "cpu", num_threads=1)
    for folder in folders:
        save_and_load(folder, topology)
    topology.close()


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
