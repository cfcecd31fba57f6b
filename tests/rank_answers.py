"""What two ranks answer to bodies of batch inference, in each shape that a model can be laid over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from places import RANKS
from programs import keep_for_ranks

from ts_parallel.partition.model.sentence_modules import transformer_folder

TENSOR_PARALLEL, PIPELINE = (2, 1), (1, 2)
BOTH = (TENSOR_PARALLEL, PIPELINE)
Asked = tuple[str, Sequence[Any], Sequence[tuple[int, int]]]
"""A task, the bodies that it is asked, and how many tensor-parallel ranks and stages there are, in each shape."""


def answers_over_ranks(asked: Mapping[Path, Asked], scratch: Path) -> dict[Path, dict[str, list[Any]]]:
    """Folder → shape (`2 × 1`) → an answer to each body."""
    for folder, (task, bodies, shapes) in asked.items():
        (folder / "asked.json").write_text(json.dumps([task, bodies, shapes]))
        for size, stages in shapes:
            sizes = {"tensor_parallel_size": size, "pipeline_parallel_size": stages}
            keep_for_ranks(transformer_folder(folder), {"task": task, "device": "cpu", **sizes})
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    command = [*ranks, str(RANKS / "batch_tasks.py"), *map(str, asked)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr
    return {folder: json.loads((folder / "answers.json").read_text()) for folder in asked}
