"""`ts-parallel verify`: the split model beside the plain one, token for token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ts_parallel.checkpoint.source import locate_checkpoint
from ts_parallel.cli.archive import handler_config
from ts_parallel.cli.options import (
    Device,
    Model,
    PipelineParallelSize,
    SplitPoints,
    TensorParallelSize,
    parse_split_points,
)
from ts_parallel.config import HandlerConfig
from ts_parallel.errors import StartupError


def verify(
    model: Model,
    tensor_parallel_size: TensorParallelSize = 1,
    pipeline_parallel_size: PipelineParallelSize = 1,
    split_points: SplitPoints = None,
    dtype: Annotated[str, typer.Option(help="Element type of both; float32 is exact.")] = "float32",
    device: Device = "cpu",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 32,
    eager: Annotated[
        bool, typer.Option("--eager", help="Run the model's own modules instead of a trace, to find out which differs.")
    ] = False,
) -> None:
    """Run the model in local ranks and plainly with transformers; exit with 1 where the greedy tokens differ."""
    config = handler_config(
        locate_checkpoint(model),
        device,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        split_points=parse_split_points(split_points),
        dtype=dtype,
        eager=eager,
    )
    rows = run_verification(config, max_tokens)
    table = Table("prompt tokens", "equal tokens", "largest difference of logits", "their scale", box=box.SIMPLE)
    for row in rows:
        equal = f"{row['num_equal']} of {row['num_tokens']}"
        table.add_row(str(row["num_prompt"]), equal, f"{row['difference']:.2e}", f"{row['scale']:.2f}")
    Console().print(table)
    is_same = all(row["num_equal"] == row["num_tokens"] for row in rows)
    shape = f"tensor_parallel_size {tensor_parallel_size} × pipeline_parallel_size {pipeline_parallel_size}"
    print(f"{shape}, {dtype}{', eager' * eager}: {'the same tokens' if is_same else 'DIFFERENT tokens'}")
    raise typer.Exit(0 if is_same else 1)


def run_verification(config: HandlerConfig, max_tokens: int) -> list[dict[str, Any]]:
    """Each prompt's comparison, made by `verify_ranks` in ranks of their own.

    Raises:
        StartupError: the ranks could not run.
    """
    with TemporaryDirectory(prefix="ts-parallel-") as scratch:
        settings, report = Path(scratch) / "settings.json", Path(scratch) / "report.json"
        settings.write_text(json.dumps({"handler": config.model_dump(mode="json"), "max_tokens": max_tokens}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(config.num_ranks), "-m", "ts_parallel.cli.verify_ranks"]
        command += [str(settings), str(report)]
        # torchrun leaves a log folder in the temporary directory: let it be one that goes.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": scratch}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if not report.is_file():
            raise StartupError("the ranks failed:\n" + result.stderr[-3000:])
        outcome = json.loads(report.read_text())
    if "error" in outcome:
        raise StartupError(outcome["error"])
    rows: list[dict[str, Any]] = outcome["rows"]
    return rows
