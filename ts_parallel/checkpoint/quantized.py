"""What says that the numbers of a checkpoint's weights are codes: files, keys, names of tensors, dtypes.

Codes are small numbers that scales, tables or zero points beside them make weights of; read as they are they give
another model. This is the one place that knows what tells of them. Whose section is understood (`codes/choose.py`) has
its weights computed while they are read; everything else is refused. Names alone; it computes nothing and reads no
weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from ts_parallel.checkpoint.codes.choose import parse_section, with_weights
from ts_parallel.checkpoint.codes.kinds.scheme import Scheme
from ts_parallel.checkpoint.settings import CONFIG_FILE, settings_folder
from ts_parallel.checkpoint.stored import CheckpointIndex
from ts_parallel.errors import CheckpointError

NOT_READ = "this package does not read such weights yet; serve the checkpoint in bfloat16 or float16"

PLAIN_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
)
"""Of numbers that can be weights themselves. In the short ones of eight bits they may be codes too."""

# Keys of a JSON file at any depth: transformers', compressed-tensors' first one, MLX's and ModelOpt's, ChatGLM's.
_KEY = re.compile(r"(hf_)?quant(ization|ize)?(_config|_bits?)?|compression_config")
# Files that are such a section as a whole: ModelOpt's, GPTQ's, AWQ's, AutoRound's, Ascend's.
_FILES = (
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json"),
    "quant_model_description*.json",
)
_NAMES_OF_CLASSES = ("label2id", "id2label")  # whose keys are words of whoever trained it
_INNER = "quantization"  # key that ModelOpt's file has the section under, beside who wrote it
_RECIPE_FILE, _RECIPE = "recipe.yaml", re.compile(r"\b(Quantization|GPTQ|AWQ|AutoRound)Modifier\b")  # llm-compressor's
_DTYPE_KEYS = ("dtype", "torch_dtype")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
# What tells most of a section, in this order.
_TELLING = ("quant_method", "quant_algo", "format", "bits", "w_bit", "load_in_4bit", "load_in_8bit", "group_size")
_SWITCHES = ("load_in_4bit", "load_in_8bit")  # bitsandbytes writes the rest of its section where both are off, too

# Format → the end of the names of tensors that no model has and nothing else writes.
_TENSORS = {
    "GPTQ or AWQ": re.compile(r"qweight|qzeros|g_idx"),
    "bitsandbytes": re.compile(r"SCB|weight\.(nested_)?(absmax|quant_map)|weight\.quant_state\..+"),
    "MXFP4": re.compile(r"(gate_up|down)_proj_(blocks|scales)"),
    "scales of FP8, FP4 or integers": re.compile(
        r"(\w*_)?weight_(scale\w*|global_scale|zero_point|packed|shape)|\w+_scale_inv"
    ),
}


@dataclass(frozen=True)
class Statement:
    """What a file of a checkpoint says of its weights."""

    file: Path
    key: str
    """The path of a key, empty where the whole file is meant."""
    value: Any

    @property
    def place(self) -> str:
        return f"{self.file}{f': {self.key}' * bool(self.key)}"

    def __str__(self) -> str:
        return f"{self.file} says {f'{self.key}: ' * bool(self.key)}{_tell(self.value)}"


def refuse_quantized(folder: Path, settings: Path | None = None) -> None:
    """Look through the files beside the weights.

    Args:
        settings: the folder of the model's configuration, where it is neither `folder` nor the one above.

    Raises:
        CheckpointError: one of them says that the weights are codes of a kind that is not read here, or would say so
            and cannot be read; it is named.
    """
    find_scheme(folder, settings)


def find_scheme(folder: Path, settings: Path | None = None) -> tuple[Scheme, Statement] | None:
    """How the weights are quantised, and where that is said; None where nothing says that they are.

    Raises:
        CheckpointError: as `refuse_quantized` does.
    """
    found: tuple[Scheme, Statement] | None = None
    recipe: Statement | None = None
    for statement in find_statements(folder, settings):
        if statement.file.name == _RECIPE_FILE:
            recipe = statement  # of how they were made, which says nothing of its own where there is a section too
            continue
        scheme = parse_section(statement.value, statement.place)
        if scheme is None:
            raise CheckpointError(f"{statement}: {NOT_READ}")
        if found is not None and found[0] != scheme:
            raise CheckpointError(f"{found[1]}, but {statement}: remove the one that is not so")
        found = found or (scheme, statement)
    if found is None and recipe is not None:
        raise CheckpointError(f"{recipe}: {NOT_READ}")
    return found


def decode_quantized(index: CheckpointIndex, folder: Path, settings: Path | None = None) -> CheckpointIndex:
    """The index of a folder with a weight in place of the tensors that make it up; as it is where none is quantised.

    Raises:
        CheckpointError: they are quantised in a way that is not read here, or otherwise than is said.
    """
    found = find_scheme(folder, settings)
    if found is None:
        return index
    scheme, statement = found
    return with_weights(index, scheme, str(statement), _dtype_of(settings or _home(folder)))


def _dtype_of(settings: Path) -> torch.dtype:
    """What config.json says that weights are, bfloat16 where it says nothing."""
    try:
        content = _read(settings / CONFIG_FILE)
    except CheckpointError:
        return torch.bfloat16
    inner = content.get("text_config") if isinstance(content, dict) else None
    said = [own.get(key) for own in (content, inner) if isinstance(own, dict) for key in _DTYPE_KEYS]
    return next((_DTYPES[name] for name in said if isinstance(name, str) and name in _DTYPES), torch.bfloat16)


def refuse_quantized_names(index: CheckpointIndex) -> None:
    """Look through the names of the tensors, where there is no model to compare them with.

    Raises:
        CheckpointError: one is of a kind that only codes have beside them.
    """
    for name, stored in index.items():
        kind = format_of(name)
        if kind is not None:
            raise CheckpointError(f"{stored.file} holds {name!r}, which quantised weights have ({kind}): {NOT_READ}")


def format_of(name: str) -> str | None:
    """Whose quantised weights have a tensor that is called so; None where nothing tells."""
    words = name.split(".")
    ends = [".".join(words[start:]) for start in range(len(words))]
    return next((kind for kind, end in _TENSORS.items() if any(end.fullmatch(own) for own in ends)), None)


def find_statements(folder: Path, settings: Path | None = None) -> Iterator[Statement]:
    """What the files beside the weights say of them."""
    for home in dict.fromkeys((settings or _home(folder), folder)):
        yield from _sections(home / CONFIG_FILE)
        for file in sorted(found for pattern in _FILES for found in home.glob(pattern)):
            content = _read(file)
            key = _INNER if isinstance(content, dict) and _INNER in content else ""
            section = content[key] if key else content
            if not _is_empty(section):
                yield Statement(file, key, section)
        recipe = home / _RECIPE_FILE
        if recipe.is_file() and (said := _RECIPE.search(recipe.read_text(errors="replace"))):
            yield Statement(recipe, "", said[0])


def says_quantised(file: Path) -> bool:
    """Whether a file of this name is there for nothing else."""
    return file.name == _RECIPE_FILE or any(file.match(pattern) for pattern in _FILES)


def without_sections(content: Any) -> Any:
    """A configuration that says nothing of quantisation any more."""
    if isinstance(content, list):
        return [without_sections(entry) for entry in content]
    if not isinstance(content, dict):
        return content
    return {
        key: value if key in _NAMES_OF_CLASSES else without_sections(value)
        for key, value in content.items()
        if key in _NAMES_OF_CLASSES or not _KEY.fullmatch(key)
    }


def _home(folder: Path) -> Path:
    try:
        return settings_folder(folder)
    except CheckpointError:
        return folder


def _sections(file: Path) -> Iterator[Statement]:
    try:
        content = _read(file)
    except CheckpointError:
        return  # whoever needs it will say so
    yield from _sections_of(content, (), file)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{file}, which says how the weights are quantised, cannot be read as JSON") from None


def _sections_of(content: Any, path: tuple[str, ...], file: Path) -> Iterator[Statement]:
    if isinstance(content, list):
        content = {str(number): entry for number, entry in enumerate(content)}
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key in _NAMES_OF_CLASSES:
            continue
        if not _KEY.fullmatch(key):
            yield from _sections_of(value, (*path, key), file)
        elif not _is_empty(value):
            yield Statement(file, ".".join((*path, key)), value)


def _is_empty(value: Any) -> bool:
    """Whether it says that nothing is quantised."""
    if isinstance(value, dict):
        switches = [value[switch] for switch in _SWITCHES if switch in value]
        if switches and value.get("quant_method", "bitsandbytes") == "bitsandbytes":
            return not any(switches)
        return all(_is_empty(own) for key, own in value.items() if not key.startswith("kv_cache"))
    return not value or str(value).lower() == "none"


def _tell(value: Any) -> str:
    if isinstance(value, dict):
        told = [f"{key} {value[key]!r}" for key in _TELLING if not _is_empty(value.get(key))]
        if told:
            return ", ".join(told[:2])
    return shorten(repr(value), 60)
