"""`ts-parallel convert`: a checkpoint of any kind that can be served → safetensors or torch.distributed.checkpoint."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ts_parallel.checkpoint.conversion.convert import convert as convert_checkpoint
from ts_parallel.checkpoint.conversion.pieces import Format
from ts_parallel.checkpoint.conversion.write_safetensors import MAX_SHARD_BYTES, Safetensors
from ts_parallel.checkpoint.settings import CONFIG_FILE
from ts_parallel.checkpoint.source import locate_checkpoint
from ts_parallel.cli.options import ConfigFolder, check_config_folder
from ts_parallel.config import parse_bytes
from ts_parallel.errors import ConfigError


class Target(StrEnum):
    SAFETENSORS = "safetensors"
    DCP = "dcp"


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a checkpoint, or the id of one on the hub.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write, which must not hold anything.")],
    to: Annotated[Target, typer.Option(help="dcp is a torch.distributed.checkpoint folder.")],
    ranks: Annotated[int | None, typer.Option(min=1, help="Of dcp: ranks that share the rows. 1 by default.")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Of safetensors: most bytes of one file. 5GB by default.")
    ] = None,
    config: ConfigFolder = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything again and compare it with the source, byte by byte.")
    ] = False,
) -> None:
    """Write a checkpoint in another format, in little memory. What was cut off goes on when it is called again."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ts_parallel.checkpoint").setLevel(logging.INFO)
    target = make_format(to, ranks, max_shard_size)
    written = convert_checkpoint(
        locate_checkpoint(source), destination, target, check_config_folder(config), compare=verify
    )
    num_bytes = sum(tensor.num_bytes for tensor in written.values())
    print(f"{destination}: {len(written)} tensors, {num_bytes:,} bytes{', all equal to the source' * verify}")
    if not (destination / CONFIG_FILE).is_file():
        print(f"no {CONFIG_FILE} was beside the source: {destination} can be served once there is one (--config)")


def make_format(to: Target, ranks: int | None, max_shard_size: str | None) -> Format:
    """
    Raises:
        ConfigError: an option of the other format, or a size that is none.
    """
    if to is Target.DCP:
        if max_shard_size is not None:
            raise ConfigError(f"--max-shard-size {max_shard_size} goes with --to safetensors, not dcp: see --ranks")
        # Not above: what torch.distributed brings with it takes seconds.
        from ts_parallel.cli.write_dcp import DistributedCheckpoint

        return DistributedCheckpoint(ranks or 1)
    if ranks is not None:
        raise ConfigError(f"--ranks {ranks} goes with --to dcp, not safetensors: see --max-shard-size")
    try:
        size: int = parse_bytes(max_shard_size or str(MAX_SHARD_BYTES))
    except ValueError as error:
        raise ConfigError(f"--max-shard-size: {error}") from None
    if size < 1:
        raise ConfigError(f"--max-shard-size must be at least 1 byte, got {max_shard_size}")
    return Safetensors(size)
