"""The files of a model's folder that are no weights: configuration, tokenizer, chat template, the model's own code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ts_parallel.checkpoint.quantized import says_quantised, without_sections
from ts_parallel.checkpoint.settings import CONFIG_FILE, settings_folder
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


def copy_companions(folder: Path, destination: Path, *, is_decoded: bool = False) -> None:
    """Copy what belongs to the weights in `folder`, from the folder above where a trainer left the configuration there.

    Args:
        is_decoded: whether the weights were quantised and are not any more: what says so stays behind.

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
        if is_decoded and says_quantised(name):
            continue
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        if is_decoded and name == Path(CONFIG_FILE):
            part.write_text(json.dumps(without_sections(json.loads((home / name).read_text())), indent=2))
        else:
            shutil.copyfile(home / name, part)
        os.replace(part, target)


def _is_weights(path: Path) -> bool:
    # .metadata is the index of torch.distributed.checkpoint.
    return path.suffix in {*_WEIGHTS, ".part"} or path.name == ".metadata" or path.name.endswith(".index.json")
