"""Programs of ranks, made in the tests' own process, which has imported the tracer already.

A process that makes one spends four seconds on imports and one on the trace. conftest.py lets all tests make theirs
here; those of `partition/test_prepared.py` that are about the process itself take `OWN_PROCESS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ts_parallel.checkpoint.index import read_index
from ts_parallel.config import BatchConfig, HandlerConfig, Seq2SeqConfig, parse_config
from ts_parallel.errors import StartupError
from ts_parallel.partition import prepared
from ts_parallel.partition.make_programs import make
from ts_parallel.partition.prepared import Pickles, prepare_program
from ts_parallel.partition.program import PipelinePlace, ProgramRequest
from ts_parallel.serving.batch.seq2seq import is_seq2seq

OWN_PROCESS = prepared._make


def make_here(request: ProgramRequest) -> Pickles:
    made = make(request)
    if isinstance(made, StartupError):
        raise made
    return made


def keep_for_ranks(folder: Path, handler: Mapping[str, Any], settings: Path | None = None) -> None:
    """Put the programs of a `handler:` section where ranks that are started with it look for them.

    Raises:
        StartupError: the section, the checkpoint or the model is refused.
    """
    section = {**handler, "model_path": str(folder)}
    kind = Seq2SeqConfig if is_seq2seq(section) else BatchConfig if "task" in handler else HandlerConfig
    config: Any = parse_config(section, kind)
    virtual_stages = getattr(config, "virtual_stages", 1)
    place = PipelinePlace(0, config.pipeline_parallel_size, virtual_stages, config.split_points)
    request = ProgramRequest(
        folder,
        config.dtype,
        0,
        config.tensor_parallel_size,
        place,
        task=getattr(config, "task", None),
        settings=settings or getattr(config, "config_folder", None),
        expert_parallel=getattr(config, "enable_expert_parallel", False),
    )
    prepare_program(request, read_index(folder))
