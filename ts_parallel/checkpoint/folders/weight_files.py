"""Which files of a folder are its weights. Names alone; none of them is opened but a list of shards.

transformers' own names come first, as transformers has them. What else people have is taken where it can be but one
thing: a variant (`model.fp16.safetensors`), shards that nobody listed, a folder that is called as a file, a single file
of another name. Where it could be several, they are listed and none is taken.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ts_parallel.checkpoint.formats.placeholders import refuse_placeholder
from ts_parallel.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
_BY_PREFERENCE = (SINGLE_FILE, SHARD_INDEX, TORCH_FILE, TORCH_INDEX)

# transformers' `variant` stands before the last word of a name.
_VARIANTS = ("model.*.safetensors", "model.safetensors.index.*.json")
_TORCH_VARIANTS = ("pytorch_model.*.bin", "pytorch_model.bin.index.*.json")
_SHARD = re.compile(r"(?P<stem>.+?)[-_](?P<number>\d+)-of-(?P<count>\d+)(?P<end>(\.\w+)?\.(safetensors|bin|pt|pth))")
_TORCHTUNE_SHARD = re.compile(r"(?P<stem>hf_model)_(?P<number>\d+)_(?P<epoch>\d+)(?P<end>\.(pt|bin|safetensors))")
_TORCH_ENDS = (".bin", ".pt", ".pth", ".ckpt")
# What lies beside weights and is none of them, or a part of what only `foreign.py` knows.
_OTHERS = re.compile(
    r"(training_args|optimizer|optim|scheduler|scaler|sampler|rng_state|random_states|dataloader|custom_checkpoint"
    r"|trainer_state|recipe_state|adapter_|common|consolidated|model_world_size_|optim_world_size_|extra_state_world_size_"
    r"|mp_rank_|zero_pp_rank_|bf16_zero_pp_rank_|layer_|model_optim_rng|tokenizer|vocab|openvino_|ggml"
    r"|shard-\d+-model-)"
)


@dataclass(frozen=True)
class WeightFiles:
    files: tuple[Path, ...]
    remark: str = ""
    """What they are, where they are not what transformers would look for."""

    @property
    def are_safetensors(self) -> bool:
        return self.files[0].suffix == ".safetensors"


class MissingWeightsError(CheckpointError):
    """What is not there may still come."""


def find_weight_files(folder: Path) -> WeightFiles | None:
    """The safetensors files or files of torch.save that hold the folder's weights; None where there are none of them.

    Raises:
        CheckpointError: they could be one thing or another, a list of shards cannot be read, or a shard is missing.
    """
    found = next((folder / name for name in _BY_PREFERENCE if (folder / name).is_file()), None)
    if found is not None:
        return WeightFiles(_files_of(found))
    return (
        _variant(folder, _VARIANTS)
        or _unlisted_shards(folder, (".safetensors",))
        or _folder_called_as_file(folder)
        or _only_file(folder, (".safetensors",))
        or _variant(folder, _TORCH_VARIANTS)
        or _unlisted_shards(folder, _TORCH_ENDS)
        or _only_file(folder, _TORCH_ENDS)
    )


def has_plain_weights(folder: Path) -> bool:
    """Whether transformers would find weights there."""
    return any((folder / name).is_file() for name in _BY_PREFERENCE)


def _files_of(file: Path) -> tuple[Path, ...]:
    """It itself, or what it lists."""
    return tuple(files_of_shard_index(file)) if file.suffix == ".json" else (file,)


def files_of_shard_index(index: Path) -> list[Path]:
    """
    Raises:
        CheckpointError: it is no such list, or names a file that is missing or of another folder.
    """
    refuse_placeholder(index)
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
            raise MissingWeightsError(f"{index} names {name!r}, which is missing")
    return [index.parent / name for name in names]


def _variant(folder: Path, patterns: Iterable[str]) -> WeightFiles | None:
    found = sorted(file for pattern in patterns for file in folder.glob(pattern))
    found = [file for file in found if file.is_file() and _SHARD.fullmatch(file.name) is None]
    if not found:
        return None
    _refuse_several(folder, [(file,) for file in found], "variants of its weights")
    return WeightFiles(_files_of(found[0]), f"the variant that the folder has ({found[0].name})")


def _unlisted_shards(folder: Path, ends: Sequence[str]) -> WeightFiles | None:
    """Shards by their numbers alone."""
    groups: dict[tuple[str, ...], dict[int, Path]] = defaultdict(dict)
    for file in sorted(folder.iterdir()):
        match = _SHARD.fullmatch(file.name) or _TORCHTUNE_SHARD.fullmatch(file.name)
        if match is None or file.suffix not in ends or _OTHERS.match(file.name) or not file.is_file():
            continue
        count = match.groupdict().get("count") or f"epoch {match['epoch']}"
        groups[match["stem"], count, match["end"]][int(match["number"])] = file
    if not groups:
        return None
    _refuse_several(folder, [tuple(own.values()) for own in groups.values()], "rows of shards without an index")
    (((_, count, _), own),) = groups.items()
    first = 0 if 0 in own else 1
    last = first + int(count) - 1 if count.isdecimal() else max(own)
    missing = sorted({*range(first, last + 1)} - own.keys())
    files = tuple(own.values())
    if missing:
        raise CheckpointError(
            f"{folder} has shards such as {files[0].name} and no index, and number "
            f"{', '.join(map(str, missing[:5]))} of {last + 1 - first} is missing: fetch or copy it too"
        )
    return WeightFiles(files, f"{len(files)} shards without an index ({files[0].name}, …)")


def _folder_called_as_file(folder: Path) -> WeightFiles | None:
    """As DeepSpeed's zero_to_fp32.py writes one today where it was told the name of a file."""
    for name in (SINGLE_FILE, TORCH_FILE):
        if (folder / name).is_dir() and (found := find_weight_files(folder / name)) is not None:
            return replace(found, remark=f"those in the folder {name}/")
    return None


def _only_file(folder: Path, ends: Sequence[str]) -> WeightFiles | None:
    found = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in ends and _OTHERS.match(file.name) is None and file.is_file()
    ]
    if not found or any(folder.glob("*.gguf")):
        return None
    _refuse_several(folder, [(file,) for file in found], "files that could be its weights")
    return WeightFiles(tuple(found), f"the one file that can be its weights ({found[0].name})")


def _refuse_several(folder: Path, found: Sequence[tuple[Path, ...]], what: str) -> None:
    if len(found) > 1:
        names = ", ".join(files[0].name + ", …" * (len(files) > 1) for files in found)
        raise CheckpointError(f"{folder} holds several {what}: {names}; leave the one to serve, or rename it")
