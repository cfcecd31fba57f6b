"""The `handler:` section of model-config.yaml, parsed once into a frozen object.

Everything after `parse_config` works with that object: no dict, no key look-up, no environment.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, overload

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ts_parallel.errors import ConfigError

API_KEY_VARIABLE = "TS_PARALLEL_API_KEY"
"""Of the environment: the keys of clients, separated by commas. On a command line others would see them."""
ARCHIVE_VERSION = "1.0"
"""Of every archive that this package writes, and so a part of its model's URL."""
_NEAR, _A_SLIP = 0.6, 0.88  # how alike two words are, from 0 to 1, by difflib
_LONGEST_SLIP = 100  # letters of a word that may have been meant to be another
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


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,  # they are the help of the command's options too
    )


class ModelConfig(_Section):
    """What every handler needs to know: which model, over which ranks."""

    model_path: str
    """Folder of the checkpoint: absolute, or relative to the unpacked archive ("." is the archive itself)."""
    tensor_parallel_size: Count = Field(default=1, ge=1)
    """Ranks that share every layer; times pipeline_parallel_size it must equal torchrun's nproc-per-node."""
    pipeline_parallel_size: Count = Field(default=1, ge=1)
    """Ranks, or groups of tensor_parallel_size ranks, that the layers are dealt out to."""
    split_points: tuple[Count, ...] | None = None
    """First layer of each stage after the first; unset: chosen so that stages weigh alike."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type of weights and KV cache; `auto` is the one that config.json names."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the ranks compute; `auto` is cuda where this machine has a GPU."""
    num_threads: Count | None = Field(default=None, ge=1)
    """CPU threads of each rank; unset: the machine's cores divided among its ranks."""
    max_step_seconds: float = Field(default=30, gt=0)
    """Longest that one forward pass of all ranks may take, the first three times as long, and ten times where some rank
    computes all the while. Beyond that a rank is taken for stuck: the worker ends, and TorchServe starts another."""

    def located_in(self, archive: Path) -> Self:
        """The same, its paths absolute; `archive` is the folder of the unpacked archive."""
        return self.model_copy(update={"model_path": str(archive / self.model_path)})

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_stages(self) -> int:
        return math.prod(self._stage_factors().values())

    def _stage_factors(self) -> dict[str, int]:
        """The keys whose product is the number of stages."""
        return {"pipeline_parallel_size": self.pipeline_parallel_size}

    @model_validator(mode="after")
    def _split_points_fit(self) -> ModelConfig:
        if self.split_points is None:
            return self
        points = list(self.split_points)
        if points != sorted({point for point in points if point > 0}):
            raise ConfigError(
                f"handler key 'split_points': stages after the first begin at layers that increase from 1, got {points}"
            )
        if len(points) != self.num_stages - 1:
            factors = " × ".join(f"{key} {value}" for key, value in self._stage_factors().items())
            raise ConfigError(
                f"handler key 'split_points': {factors} makes {self.num_stages} stages, which need "
                f"{self.num_stages - 1} split points, got {len(points)}: {points}"
            )
        return self


class HandlerConfig(ModelConfig):
    """Text generation."""

    config_path: str | None = None
    """Folder of config.json and tokenizer, as model_path; unset: with the weights, or in the folder above a
    torch.distributed.checkpoint."""
    adapter_path: str | None = None
    """Folder of a LoRA adapter that is merged into the weights as they are read; as model_path."""
    enable_expert_parallel: bool = False
    """Whether each of the ranks that share a layer keeps some of its experts whole, instead of a part of each."""
    quantization: Literal["int8", "int4"] | None = None
    """Integers that the weights of linears become as they are read, on a CPU; unset: they stay as dtype has them."""
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
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Part of a GPU's memory for weights and KV cache together, in place of `kv_cache_memory`; the rest is for what a
    step computes."""
    max_num_waiting: Count = Field(default=1024, ge=0)
    """Most requests that wait beside those that run; more are refused with 429."""
    max_request_seconds: float | None = Field(default=None, gt=0)
    """Longest that a request may take, waiting included; unset: as long as it asks for."""
    enable_prefix_caching: bool = True
    """Whether prompts that begin alike share what was computed for one of them."""
    max_prefill_slowdown: float = Field(default=1.6, gt=1)
    """How many times as long a step of decoding requests may take while one prompt is prefilled beside them."""
    stream_interval: float = Field(default=0.03, ge=0, le=1)
    """Seconds for which tokens that continue answers gather before they are sent; the first token of an answer and its
    end wait for nothing. 0: all leave as soon as TorchServe takes them."""
    served_model_name: str | None = None
    """Names by which clients ask for the model, separated by commas; the first stands in answers. Unset: the archive's.
    """
    strict: bool = False
    """Whether a request's unknown fields are refused; else what would change the answer is, and the rest ignored."""
    clamp_max_tokens: bool = False
    """Whether max_tokens beyond what there is room for mean just that; else they are refused."""
    chat_format: str = "auto"
    """How the model writes reasoning and tool calls: a family's name, `none`, or `auto`, which asks the tokenizer."""
    split_reasoning: bool = True
    """Whether what a chat model thinks before it answers is sent as `reasoning_content` instead of as content."""
    eager: bool = False
    """Run the model's own modules instead of the traced stage, to find faults; pipeline_parallel_size 1 only."""

    @property
    def config_folder(self) -> Path | None:
        return None if self.config_path is None else Path(self.config_path)

    def resolve_max_model_len(self, positions: int | None) -> int:
        """The configured length, or all the `positions` that the model was trained for.

        Raises:
            ConfigError: the model has fewer positions than were asked for.
        """
        wanted = self.max_model_len or positions
        if wanted is None:
            raise ConfigError("config.json names no max_position_embeddings: set max_model_len")
        if positions is not None and wanted > positions:
            raise ConfigError(f"max_model_len {wanted} is more than the model's max_position_embeddings {positions}")
        return wanted

    @model_validator(mode="after")
    def _kv_memory_has_one_size(self) -> HandlerConfig:
        if self.gpu_memory_utilization is None:
            return self
        if self.device == "cpu":
            raise ConfigError("handler key 'gpu_memory_utilization': device cpu has no GPU: set kv_cache_memory")
        if "kv_cache_memory" in self.model_fields_set:
            raise ConfigError(
                f"handler key 'gpu_memory_utilization': {self.gpu_memory_utilization} and kv_cache_memory "
                f"{self.kv_cache_memory} both give the KV cache its size: leave one out"
            )
        return self

    def located_in(self, archive: Path) -> Self:
        paths = {"config_path": self.config_path, "adapter_path": self.adapter_path}
        absolute = {key: str(archive / path) for key, path in paths.items() if path is not None}
        return super().located_in(archive).model_copy(update=absolute)

    @model_validator(mode="after")
    def _quantization_is_of_16_bits_on_a_cpu(self) -> HandlerConfig:
        if self.quantization is None:
            return self
        key = f"handler key 'quantization': {self.quantization}"
        if self.device == "cuda":
            raise ConfigError(f"{key} is for device cpu, not cuda: leave quantization out")
        if self.dtype not in ("auto", "bfloat16", "float16"):
            raise ConfigError(f"{key} is of bfloat16 or float16 weights, not {self.dtype}: set dtype to bfloat16")
        if self.eager:
            raise ConfigError(f"{key} is for a traced model, not its own modules: set eager to false")
        return self

    @model_validator(mode="after")
    def _adapter_is_not_eager(self) -> HandlerConfig:
        if self.eager and self.adapter_path is not None:
            raise ConfigError(
                f"handler key 'adapter_path': {self.adapter_path!r} can be merged into a traced model only: set eager "
                "to false"
            )
        return self

    @model_validator(mode="after")
    def _eager_is_one_stage(self) -> HandlerConfig:
        if self.eager and self.pipeline_parallel_size > 1:
            raise ConfigError(
                "handler key 'eager': the model's own modules run in one stage only: set pipeline_parallel_size, got "
                f"{self.pipeline_parallel_size}, to 1, or eager to false"
            )
        return self


class Parallelism(_Section):
    """Worker threads beside the inference."""

    preprocess: Count = Field(default=1, ge=1)
    postprocess: Count = Field(default=1, ge=1)


class BatchConfig(ModelConfig):
    """Batch inference."""

    task: Literal[
        "text_embedding",
        "text_classification",
        "token_classification",
        "question_answering",
        "fill_mask",
        "image_classification",
        "object_detection",
        "semantic_segmentation",
        "ctc_speech_recognition",
        "encoder",
    ]
    """What goes in and comes out; `encoder` answers with the last hidden states."""
    micro_batch_size: Count = Field(default=8, ge=1)
    """Most items that a stage computes at once."""
    virtual_stages: Count = Field(default=1, ge=1)
    """Stages of each rank, looped: stage k lives on pipeline rank k % pipeline_parallel_size."""
    parallelism: Parallelism = Parallelism()
    max_items: Count = Field(default=2048, ge=1)
    """Most texts, pairs of texts, documents or windows of a text of one request."""
    max_audio_seconds: float = Field(default=120, gt=0)
    """Longest recording that is heard."""

    def _stage_factors(self) -> dict[str, int]:
        return {**super()._stage_factors(), "virtual_stages": self.virtual_stages}


class Seq2SeqConfig(ModelConfig):
    """Batch inference of encoder–decoder models."""

    task: Literal["text2text_generation", "automatic_speech_recognition"]
    """What goes in: texts, or speech."""
    micro_batch_size: Count = Field(default=8, ge=1)
    """Most items that a stage computes at once."""
    parallelism: Parallelism = Parallelism()
    max_new_tokens: Count | None = Field(default=None, ge=1)
    """Most tokens of an answer, of speech in each window; a request may ask for fewer. Unset: 128 to a text, and of
    speech what the decoder has positions for."""
    max_audio_seconds: float = Field(default=600, gt=0)
    """Longest recording that is heard."""


C = TypeVar("C", bound=ModelConfig)


@overload
def parse_config(section: Mapping[str, Any] | None) -> HandlerConfig: ...


@overload
def parse_config(section: Mapping[str, Any] | None, kind: type[C]) -> C: ...


def parse_config(section: Mapping[str, Any] | None, kind: type[ModelConfig] = HandlerConfig) -> ModelConfig:
    """The `handler:` section as a `kind`.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a missing key, a value outside its limits, or
            values that do not go together.
    """
    if not isinstance(section, Mapping):
        raise ConfigError("model-config.yaml has no `handler:` section; it needs at least `model_path`")
    _refuse_unknown(section, kind, "the handler section")
    try:
        return kind(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise ConfigError(f"handler key {key!r}: {first['msg']}{value}") from None


def _refuse_unknown(section: Mapping[Any, Any], kind: type[BaseModel], where: str) -> None:
    for key, value in section.items():
        if key not in kind.model_fields:
            raise ConfigError(f"unknown key {key!r} in {where}{did_you_mean(key, kind.model_fields)}")
        inside = kind.model_fields[key].annotation
        if isinstance(inside, type) and issubclass(inside, BaseModel) and isinstance(value, Mapping):
            _refuse_unknown(value, inside, f"handler.{key}")


def parse_api_keys(text: str | None) -> tuple[str, ...]:
    """
    Raises:
        ConfigError: there are no keys in it, or one that no header can have. It does not say which.
    """
    if text is None:
        return ()
    keys = tuple(key.strip() for key in text.split(",") if key.strip())
    if not keys or not all(re.fullmatch(r"[!-~]+", key) for key in keys):
        raise ConfigError(
            f"{API_KEY_VARIABLE} (--api-key) needs one or more keys of visible ASCII letters, separated by commas"
        )
    return keys


def check_origin(origin: str | None) -> None:
    """
    Raises:
        ConfigError: it is no one origin as browsers name it.
    """
    if origin is not None and origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s,]+", origin):
        raise ConfigError(f"--cors-origin {origin!r} is neither one origin, such as https://chat.local, nor * for any")


def did_you_mean(word: object, known: Mapping[str, Any], is_slip: bool = False) -> str:
    """`": did you mean 'max_tokens'?"`, or nothing where no known word is near; with `is_slip`, but a letter or two
    away."""
    if len(str(word)) > _LONGEST_SLIP:
        return ""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=_A_SLIP if is_slip else _NEAR)
    return f": did you mean {near[0]!r}?" if near else ""
