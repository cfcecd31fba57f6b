"""The files of a model's folder that are no weights: configuration, tokenizer, chat template, the model's own code."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.errors import CheckpointError

_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".ot", ".npz"),
    *(".onnx", ".onnx_data", ".tflite", ".pb", ".mar"),
}


def companion_files(folder: Path, besides: Path | None = None) -> Iterator[Path]:
    """The files, relative to `folder`: nothing hidden, no folder with weights of its own, not the folder `besides`."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (besides is not None and path.resolve() == besides.resolve()):
            continue
        if path.is_dir():
            if not weight_files(path):
                yield from (path.relative_to(folder) / inner for inner in companion_files(path, besides))
        elif path.is_file() and not _is_weights(path):
            yield path.relative_to(folder)


def weight_files(folder: Path) -> list[Path]:
    """What `folder` itself holds of weights, with the files that say where they are."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and _is_weights(path)]


def copy_companions(folder: Path, destination: Path) -> None:
    """Copy what belongs to the weights in `folder`, from the folder above where a trainer left the configuration there.

    Raises:
        OSError: a file cannot be read or written.
    """
    try:
        home = settings_folder(folder)
    except CheckpointError:  # weights alone are worth converting too
        home = folder
    for name in companion_files(home, besides=destination):
        if home != folder and len(name.parts) > 1:
            continue  # folders beside the checkpoint are a trainer's
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        shutil.copyfile(home / name, part)
        os.replace(part, target)


def _is_weights(path: Path) -> bool:
    # .metadata is the index of torch.distributed.checkpoint.
    return path.suffix in {*_WEIGHTS, ".part"} or path.name == ".metadata" or path.name.endswith(".index.json")
