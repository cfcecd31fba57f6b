"""The folder that a path stands for: itself, what a GGUF file becomes, or the one checkpoint in a trainer's folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ts_parallel.checkpoint.folders.foreign import refuse_foreign
from ts_parallel.checkpoint.folders.rank_shards import rank_files
from ts_parallel.checkpoint.folders.weight_files import find_weight_files
from ts_parallel.checkpoint.formats.dcp import METADATA
from ts_parallel.checkpoint.gguf.prepared import gguf_folder, is_gguf
from ts_parallel.checkpoint.settings import files_of_authors
from ts_parallel.errors import CheckpointError

logger = logging.getLogger(__name__)

_PARTS_OF_MODEL = "modules.json"  # of sentence-transformers: its folders are parts of one model
_DIGITS = re.compile(r"(\d+)")


def checkpoint_folder(path: Path) -> Path:
    """
    Raises:
        CheckpointError: it holds several checkpoints, or one in a form that is not read here.
    """
    path = gguf_folder(path)
    if is_gguf(path) or not path.is_dir() or holds_weights(path) or (path / _PARTS_OF_MODEL).is_file():
        return path
    refuse_foreign(path)
    inner = inner_checkpoints(path)
    if not inner:
        return path
    if len(inner) > 1:
        names = ", ".join(folder.name for folder in inner)
        raise CheckpointError(
            f"{path} holds no weights itself, but its folders {names} do: name the one to serve, as {inner[-1]}"
        )
    logger.warning("%s holds no weights itself; the checkpoint in its folder %s is taken", path, inner[0].name)
    return inner[0]


def holds_weights(folder: Path) -> bool:
    """Whether there are files that are read here, or would be if they were not several or cut off."""
    if (folder / METADATA).is_file() or any(folder.glob("*.distcp")) or any(folder.glob("*.gguf")):
        return True
    if any(folder.glob("shard-*-model-*.safetensors")) or rank_files(folder) or files_of_authors(folder):
        return True
    try:
        return find_weight_files(folder) is not None
    except CheckpointError:
        return True


def inner_checkpoints(folder: Path) -> list[Path]:
    """The folders one level down that hold weights, a later number after an earlier one."""
    inner = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted((path for path in inner if holds_weights(path)), key=_by_number)


def _by_number(folder: Path) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdecimal() else (0, word) for word in _DIGITS.split(folder.name)]
