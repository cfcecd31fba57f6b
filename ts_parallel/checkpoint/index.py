"""A checkpoint folder as an index: name → dtype, shape, files and byte ranges. No weight is read, no pickle executed.

Which format a folder has it says itself: safetensors, transformers' older `pytorch_model.bin`, both whole or in shards,
what torch.distributed.checkpoint writes, or a GGUF file. The modules that are called here know the formats themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from ts_parallel.checkpoint.formats.dcp import METADATA, read_distributed
from ts_parallel.checkpoint.formats.safetensors_files import read_distributed_safetensors, read_safetensors
from ts_parallel.checkpoint.formats.torch_files import read_torch_tensors
from ts_parallel.checkpoint.gguf.tensors import read_gguf
from ts_parallel.checkpoint.quantized import decode_quantized
from ts_parallel.checkpoint.stored import CheckpointIndex, StoredPart, StoredTensor
from ts_parallel.errors import CheckpointError

__all__ = ["SHARD_INDEX", "SINGLE_FILE", "CheckpointIndex", "StoredPart", "StoredTensor", "read_index"]

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

# As transformers, where a folder holds several of them.
_BY_PREFERENCE: dict[str, Callable[[Path], Iterable[StoredTensor]]] = {
    SINGLE_FILE: read_safetensors,
    SHARD_INDEX: read_safetensors,
    TORCH_FILE: read_torch_tensors,
    TORCH_INDEX: read_torch_tensors,
}


def read_index(folder: Path, settings: Path | None = None) -> CheckpointIndex:
    """The tensors of a model's folder: of safetensors, `pytorch_model.bin`, a torch.distributed.checkpoint, or GGUF.
    Weights that are quantised are there as what is computed of them.

    Args:
        settings: the folder of the model's configuration, where it is neither `folder` nor the one above.

    Raises:
        CheckpointError: no such folder, no checkpoint in it or two of different kinds, a file that is missing, cut off
            or of another format, tensors of which a part is missing, a pickle that holds more than tensors, or weights
            that are quantised in a way that is not read here.
    """
    return decode_quantized(_read_stored(folder), folder, settings)


def _read_stored(folder: Path) -> CheckpointIndex:
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder {folder}")
    found = next((name for name in _BY_PREFERENCE if (folder / name).is_file()), None)
    if (folder / METADATA).is_file():
        if found is not None:
            raise CheckpointError(
                f"{folder} holds two checkpoints, {found} and a torch.distributed.checkpoint ({METADATA}): "
                "move one of them to a folder of its own"
            )
        return _by_name(read_distributed(folder))
    if found is None:
        return _by_name(_without_an_index(folder))
    files = _files_of_shard_index(folder / found) if found.endswith(".json") else [folder / found]
    return _by_name(tensor for file in files for tensor in _BY_PREFERENCE[found](file))


def read_index_if_whole(folder: Path, settings: Path | None = None) -> CheckpointIndex:
    """Empty where the folder's weights are still to be fetched: it can be planned for all the same.

    Args:
        settings: as of `read_index`.

    Raises:
        CheckpointError: they are there, and cannot be read.
    """
    try:
        return read_index(folder, settings)
    except _MissingError:
        return {}


class _MissingError(CheckpointError):
    """What is not there may still come."""


def _by_name(tensors: Iterable[StoredTensor]) -> CheckpointIndex:
    return {tensor.name: tensor for tensor in tensors}


def _without_an_index(folder: Path) -> Iterable[StoredTensor]:
    shards = sorted(folder.glob("shard-*-model-*.safetensors"))
    if shards:
        return read_distributed_safetensors(shards)
    if any(folder.glob("*.distcp")):
        raise CheckpointError(f"{folder} has *.distcp files but no {METADATA}: it was not saved to the end")
    gguf = sorted(folder.glob("*.gguf"))
    if len(gguf) > 1:
        names = ", ".join(file.name for file in gguf)
        raise CheckpointError(f"{folder} holds {names}: name the one to serve, as {gguf[0]}")
    if gguf:
        return read_gguf(gguf[0])
    others = f"{TORCH_FILE}, {TORCH_INDEX}, {METADATA} nor *.gguf"
    raise _MissingError(f"neither {SINGLE_FILE} nor {SHARD_INDEX}, {others} in {folder}")


def _files_of_shard_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a file name that is no text")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a shard index: {error!r}") from None
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file of its own folder")
        if not (index.parent / name).is_file():
            raise _MissingError(f"{index} names {name!r}, which is missing")
    return [index.parent / name for name in names]
