"""`ts-parallel archive`: the model-config.yaml and the call of torch-model-archiver that a checkpoint needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
import yaml

from ts_parallel.checkpoint.index import read_index_if_whole
from ts_parallel.checkpoint.quantized import refuse_quantized, refuse_quantized_names
from ts_parallel.checkpoint.source import locate_checkpoint
from ts_parallel.cli.handler_options import HandlerKeys, takes_handler_keys
from ts_parallel.cli.options import Model
from ts_parallel.config import ARCHIVE_VERSION, HandlerConfig, ModelConfig, parse_config
from ts_parallel.errors import ConfigError, StartupError

Name = Annotated[str | None, typer.Option(help="Name of the model in URLs, by default the folder's.")]


@takes_handler_keys()
def archive(
    model: Model,
    keys: HandlerKeys,
    name: Name = None,
    export_path: Annotated[Path, typer.Option(help="Folder that the archive is written to.")] = Path("model_store"),
) -> None:
    """Write NAME.mar for `torchserve --start`. The weights stay where they are; the archive names their folder."""
    folder = locate_checkpoint(model)
    settings = handler_config(folder, **keys)
    refuse_quantized(folder, settings.config_folder)
    refuse_quantized_names(read_index_if_whole(folder, settings.config_folder))
    print(write_archive(settings, name or default_name(folder), export_path))


def handler_config(folder: Path, device: str = "auto", **settings: Any) -> HandlerConfig:
    """The configuration of the checkpoint in `folder` on this machine; `settings` are further keys of `HandlerConfig`.

    Raises:
        ConfigError: as `parse_config` does.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return parse_config({"model_path": str(folder), "device": device, **settings})


def default_name(folder: Path) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in folder.name)


def write_archive(config: HandlerConfig, name: str, export_path: Path) -> Path:
    """Run torch-model-archiver; the path of the archive.

    Raises:
        ConfigError: the name is none that TorchServe takes.
        StartupError: torch-model-archiver failed.
    """
    if name != default_name(Path(name)) or not name:
        raise ConfigError(f"a model's name has letters, digits, '-' and '_' only, got {name!r}")
    export_path.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="ts-parallel-") as folder:
        config_file = Path(folder) / "model-config.yaml"
        config_file.write_text(yaml.safe_dump(model_config(config), sort_keys=False))
        command = [
            sys.executable,
            "-m",
            "model_archiver.model_packaging",
            "--model-name",
            name,
            "--version",
            ARCHIVE_VERSION,
        ]
        command += ["--handler", str(handler_file()), "--config-file", str(config_file)]
        command += ["--export-path", str(export_path), "--force"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise StartupError(f"torch-model-archiver failed: {result.stderr.strip().splitlines()[-1]}")
    return export_path / f"{name}.mar"


def model_config(config: HandlerConfig) -> dict[str, Any]:
    """The model-config.yaml of one model on this machine; model-configs/ explains its keys."""
    handler = {key: value for key, value in config.model_dump(mode="json").items() if value is not None}
    if config.gpu_memory_utilization is not None:
        del handler["kv_cache_memory"]  # its default, which beside the other would be refused
    return {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 2 * config.max_num_seqs,
        "maxBatchDelay": 1,
        "responseTimeout": 300,
        "startupTimeout": 1200,
        "deviceType": "gpu" if config.device == "cuda" else "cpu",
        "parallelType": parallel_type(config),
        "continuousBatching": True,
        "torchrun": {"nproc-per-node": config.num_ranks},
        "handler": handler,
    }


def parallel_type(config: ModelConfig) -> str:
    """TorchServe's name for the shape; a name that it does not know would start no torchrun at all, with a warning."""
    if config.pipeline_parallel_size == 1:
        return "tp"
    return "pp" if config.tensor_parallel_size == 1 else "pptp"


def handler_file() -> Path:
    """`handlers/text_generation.py`: in the wheel it lies inside the package, in a checkout beside it."""
    package = Path(__file__).parents[2]
    packaged = package / "_handlers" / "text_generation.py"
    return packaged if packaged.is_file() else package.parent / "handlers" / "text_generation.py"
