"""Arguments that several sub-commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ts_parallel.checkpoint.settings import CONFIG_FILE
from ts_parallel.checkpoint.source import locate_folder
from ts_parallel.config import parse_bytes
from ts_parallel.errors import ConfigError

Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or the id of one on the hub.")]
CONFIG_HELP = "Folder of config.json and tokenizer, where they are not with the weights."
ConfigFolder = Annotated[Path | None, typer.Option(metavar="DIR", help=CONFIG_HELP)]
MaxRequestSize = Annotated[
    str, typer.Option(help="Most bytes of a request's body, such as 64MiB; a larger one is answered with 413.")
]
MaxResponseSize = Annotated[
    str, typer.Option(help="Most bytes of an answer that is not streamed; a larger one becomes a 413.")
]

_LEAST_MESSAGE_SIZE = 1 << 16  # what headers, errors and the list of models are well below
_MOST_MESSAGE_SIZE = 2**31 - 1  # Java's int


def parse_split_points(text: str | None) -> tuple[int, ...] | None:
    """`"6,12"` → `(6, 12)`.

    Raises:
        ConfigError: it is no list of numbers.
    """
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ConfigError(f"--split-points {text!r} is no list of layers such as 6,12") from None


def parse_message_size(text: str, option: str) -> int:
    """`"64MiB"` → bytes of a body, as TorchServe takes them.

    Raises:
        ConfigError: it is no size, or one that TorchServe cannot work with.
    """
    try:
        size: int = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    if not _LEAST_MESSAGE_SIZE <= size <= _MOST_MESSAGE_SIZE:
        raise ConfigError(f"{option} {text} is not between {_LEAST_MESSAGE_SIZE} and {_MOST_MESSAGE_SIZE} bytes")
    return size


def locate_adapter(adapter: str | None) -> str | None:
    """
    Raises:
        CheckpointError: as `locate_folder`.
    """
    return None if adapter is None else str(locate_folder(adapter))


def check_config_folder(folder: Path | None) -> Path | None:
    """The same, absolute.

    Raises:
        ConfigError: it has no config.json.
    """
    if folder is not None and not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"--config {folder} has no {CONFIG_FILE}")
    return folder and folder.resolve()


def config_path(folder: Path | None) -> str | None:
    """The handler key for `--config`.

    Raises:
        ConfigError: as `check_config_folder`.
    """
    found = check_config_folder(folder)
    return None if found is None else str(found)
