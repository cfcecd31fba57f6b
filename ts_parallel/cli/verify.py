"""`ts-parallel verify`: the split model beside the plain one, token for token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ts_parallel.checkpoint.conversion.companions import companion_files, weight_files
from ts_parallel.checkpoint.folders.weight_files import has_plain_weights
from ts_parallel.checkpoint.gguf.prepared import is_gguf_folder
from ts_parallel.checkpoint.index import has_plain_names
from ts_parallel.checkpoint.quantized import refuse_quantized
from ts_parallel.checkpoint.settings import CONFIG_FILE, settings_folder
from ts_parallel.checkpoint.source import locate_checkpoint
from ts_parallel.cli.handler_options import HandlerKeys, takes_handler_keys
from ts_parallel.cli.options import ConfigFolder, Model, check_config_folder
from ts_parallel.cli.server.archive import handler_config
from ts_parallel.cli.verify_ranks import GGUF, method_of
from ts_parallel.config import HandlerConfig
from ts_parallel.errors import CheckpointError, ConfigError, StartupError
from ts_parallel.partition.model.model_config import read_model_config

# Method of quantisation → what transformers needs to compute weights of it on a CPU.
_NEEDED_TO_DEQUANTISE = {
    "bitsandbytes": ("accelerate", "bitsandbytes"),
    "compressed-tensors": ("accelerate", "compressed_tensors"),
    "fp8": ("accelerate",),
    "mxfp4": ("accelerate",),
    GGUF: ("accelerate",),
}


@takes_handler_keys(
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "split_points",
    "dtype",
    "device",
    "eager",
    "enable_expert_parallel",
    "quantization",
    dtype="float32",
    device="cpu",
)
def verify(
    model: Model,
    keys: HandlerKeys,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 32,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Hugging Face folder of the plain model, by default MODEL itself."),
    ] = None,
    config: ConfigFolder = None,
) -> None:
    """Run the model in local ranks and plainly with transformers; exit with 1 where the greedy tokens differ."""
    with together(locate_checkpoint(model), check_config_folder(config)) as folder:
        plain = check_reference(folder, reference)
        refuse_quantized(folder)
        settings = handler_config(folder, **keys)
        rows = run_verification(settings, max_tokens, plain)
    table = Table("prompt tokens", "equal tokens", "largest difference of logits", "their scale", box=box.SIMPLE)
    for row in rows:
        equal = f"{row['num_equal']} of {row['num_tokens']}"
        table.add_row(str(row["num_prompt"]), equal, f"{row['difference']:.2e}", f"{row['scale']:.2f}")
    Console().print(table)
    is_same = all(row["num_equal"] == row["num_tokens"] for row in rows)
    print(f"{describe(settings)}: {'the same tokens' if is_same else 'DIFFERENT tokens'}")
    raise typer.Exit(0 if is_same else 1)


def describe(config: HandlerConfig) -> str:
    shape = f"tensor_parallel_size {config.tensor_parallel_size}"
    shape += f" × pipeline_parallel_size {config.pipeline_parallel_size}"
    shape += ", expert parallel" * config.enable_expert_parallel
    shape += f", {config.quantization}" if config.quantization else ""
    return f"{shape}, {config.dtype}{', eager' * config.eager}"


@contextmanager
def together(weights: Path, config: Path | None) -> Iterator[Path]:
    """A folder with the weights of the one and everything else of the other: `weights` itself where that has both."""
    if config is None:
        yield weights
        return
    with TemporaryDirectory(prefix="ts-parallel-") as scratch:
        for file in weight_files(weights):
            (Path(scratch) / file.name).symlink_to(file)
        for name in companion_files(config):
            link = Path(scratch) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((config / name).resolve())
        yield Path(scratch)


def check_reference(folder: Path, reference: Path | None) -> Path:
    """The folder that transformers shall read.

    Raises:
        ConfigError: there is none that it can read, or it is another model's.
        CheckpointError: its config.json, or that of `folder`, is missing or cannot be read.
    """
    try:
        settings_folder(folder)
    except CheckpointError:
        raise ConfigError(f"no {CONFIG_FILE} in {folder}: name the folder that has it with --config") from None
    if reference is None:
        if not has_plain_weights(folder) and not is_gguf_folder(folder):
            raise ConfigError(
                f"transformers cannot read the weights of {folder}: name a Hugging Face folder of the same ones with "
                "--reference"
            )
        if has_plain_weights(folder) and not has_plain_names(folder):
            raise ConfigError(
                f"transformers would not find the weights of {folder} under the names that they have there: name a "
                "Hugging Face folder of the same ones with --reference (`ts-parallel convert` writes one)"
            )
        check_transformers_reads(folder)
        return folder
    sizes = [read_model_config(each).get_text_config().vocab_size for each in (folder, reference)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"--reference {reference} has a vocabulary of {sizes[1]} tokens, {folder} one of {sizes[0]}")
    return reference.resolve()


def check_transformers_reads(folder: Path) -> None:
    """
    Raises:
        ConfigError: its weights are quantised in a way that transformers cannot compute them of here.
    """
    method = method_of(folder)
    if not method:
        return
    needed = _NEEDED_TO_DEQUANTISE.get(method)
    missing = [name for name in needed or () if find_spec(name) is None]
    if needed is None or missing:
        reason = f"without {' and '.join(missing)}" if missing else "on their own"
        raise ConfigError(
            f"transformers cannot compute the weights in {folder}, {method}, {reason}: name a folder with plain "
            "ones by --reference"
        )


def run_verification(config: HandlerConfig, max_tokens: int, reference: Path) -> list[dict[str, Any]]:
    """Each prompt's comparison with the model of `reference`, made by `verify_ranks` in ranks of their own.

    Raises:
        StartupError: the ranks could not run.
    """
    with TemporaryDirectory(prefix="ts-parallel-") as scratch:
        settings, report = Path(scratch) / "settings.json", Path(scratch) / "report.json"
        values = {"handler": config.model_dump(mode="json"), "max_tokens": max_tokens, "reference": str(reference)}
        settings.write_text(json.dumps(values))
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
