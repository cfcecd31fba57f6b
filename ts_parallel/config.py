"""The `handler:` section of model-config.yaml, parsed once into a frozen object.

Everything after `parse_config` works with `HandlerConfig`: no dict, no key look-up, no environment.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ts_parallel.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _no_bool(value: Any) -> Any:
    """YAML's `yes` is not a number, though Python's True is one."""
    if isinstance(value, bool):
        raise ValueError("Input should be a valid integer")
    return value


def parse_bytes(value: Any) -> Any:
    """`"1.5GiB"` → bytes. Numbers pass through, for pydantic to judge."""
    if not isinstance(value, str):
        return _no_bool(value)
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d*)?|\.\d+)\s*([kmg]?i?b?)\s*", value.lower())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"{value!r} is not a size; write a number of bytes or something like '2GiB'")
    return int(float(match[1]) * _UNITS[match[2]])


Count = Annotated[int, BeforeValidator(_no_bool)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class HandlerConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_path: str
    """Folder of the checkpoint: absolute, or relative to the unpacked archive ("." is the archive itself)."""
    tensor_parallel_size: Count = Field(default=1, ge=1)
    """Ranks that share every layer; must equal torchrun's nproc-per-node."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type of weights and KV cache; `auto` is the one that config.json names."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: Count | None = Field(default=None, ge=2)
    """Most tokens of a request, prompt and answer together; unset: the model's max_position_embeddings."""
    max_num_seqs: Count = Field(default=32, ge=1)
    """Most requests that run in one step; the others wait."""
    max_num_batched_tokens: Count = Field(default=512, ge=1)
    """Most tokens of one step, over all its requests; longer prompts are prefilled in several steps."""
    block_size: Count = Field(default=16, ge=1)
    """Tokens of one KV block."""
    kv_cache_memory: Bytes = Field(default=512 * 2**20, ge=1)
    """Bytes of KV cache on each rank."""
    num_threads: Count | None = Field(default=None, ge=1)
    """CPU threads of each rank; unset: the machine's cores divided among its ranks."""


def parse_config(section: Mapping[str, Any] | None) -> HandlerConfig:
    """The `handler:` section as a `HandlerConfig`.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a missing key, or a value outside its limits.
    """
    if not isinstance(section, Mapping):
        raise ConfigError("model-config.yaml has no `handler:` section; it needs at least `model_path`")
    for key in section:
        if key not in HandlerConfig.model_fields:
            raise ConfigError(
                f"unknown key {key!r} in the handler section{did_you_mean(key, HandlerConfig.model_fields)}"
            )
    try:
        return HandlerConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise ConfigError(f"handler key {key!r}: {first['msg']}{value}") from None


def did_you_mean(word: object, known: Mapping[str, Any]) -> str:
    """`": did you mean 'max_tokens'?"`, or nothing where no known word is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""
