"""The handler section becomes one frozen object, or one line that names the key at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ts_parallel.config import BatchConfig, HandlerConfig, ModelConfig, did_you_mean, parse_bytes, parse_config
from ts_parallel.errors import ConfigError

MODEL_DEFAULTS = {
    "model_path": "m",
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "split_points": None,
    "dtype": "auto",
    "device": "auto",
    "num_threads": None,
    "max_step_seconds": 30,
}
DEFAULTS = {
    **MODEL_DEFAULTS,
    "config_path": None,
    "adapter_path": None,
    "enable_expert_parallel": False,
    "quantization": None,
    "max_model_len": None,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "block_size": 16,
    "kv_cache_memory": 512 * 2**20,
    "gpu_memory_utilization": None,
    "max_num_waiting": 1024,
    "max_request_seconds": None,
    "enable_prefix_caching": True,
    "max_prefill_slowdown": 1.6,
    "stream_interval": 0.03,
    "served_model_name": None,
    "strict": False,
    "clamp_max_tokens": False,
    "chat_format": "auto",
    "split_reasoning": True,
    "eager": False,
}
BATCH_DEFAULTS = {
    **MODEL_DEFAULTS,
    "task": "encoder",
    "micro_batch_size": 8,
    "virtual_stages": 1,
    "parallelism": {"preprocess": 1, "postprocess": 1},
    "max_items": 2048,
    "max_audio_seconds": 120,
}
MODEL_SECTION = {
    "model_path": "/models/m",
    "tensor_parallel_size": 4,
    "pipeline_parallel_size": 3,
    "split_points": (6, 12),
    "dtype": "bfloat16",
    "device": "cpu",
    "num_threads": 3,
    "max_step_seconds": 2.5,
}


def test_every_key_but_the_path_and_the_task_has_its_default() -> None:
    assert parse_config({"model_path": "m"}).model_dump() == DEFAULTS
    assert parse_config({"model_path": "m", "task": "encoder"}, BatchConfig).model_dump() == BATCH_DEFAULTS


def test_every_key_reaches_its_field() -> None:
    section = {
        **MODEL_SECTION,
        "config_path": "settings",
        "adapter_path": "lora",
        "enable_expert_parallel": True,
        "quantization": "int4",
        "max_model_len": 2,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 7,
        "block_size": 8,
        "kv_cache_memory": 1000,
        "max_num_waiting": 0,
        "max_request_seconds": 1.5,
        "enable_prefix_caching": False,
        "max_prefill_slowdown": 2.5,
        "stream_interval": 0.5,
        "served_model_name": "gpt-4o,demo",
        "strict": True,
        "clamp_max_tokens": True,
        "chat_format": "hermes",
        "split_reasoning": False,
    }
    assert section.keys() | {"eager", "gpu_memory_utilization"} == DEFAULTS.keys()
    assert parse_config(section).model_dump() == {**section, "eager": False, "gpu_memory_utilization": None}
    assert parse_config({"model_path": "m", "gpu_memory_utilization": 0.9}).gpu_memory_utilization == 0.9
    assert parse_config({"model_path": "m", "eager": True}).eager


def test_every_key_of_batch_inference_reaches_its_field() -> None:
    section = {
        **MODEL_SECTION,
        "split_points": (1, 2, 3, 4, 5),
        "task": "text_embedding",
        "micro_batch_size": 5,
        "virtual_stages": 2,
        "parallelism": {"preprocess": 2, "postprocess": 3},
        "max_items": 7,
        "max_audio_seconds": 2.5,
    }
    assert section.keys() == BATCH_DEFAULTS.keys()
    config = parse_config(section, BatchConfig)
    assert config.model_dump() == section
    assert (config.num_ranks, config.num_stages) == (12, 6)


def test_split_points_are_written_as_yaml_has_them() -> None:
    assert parse_config({"model_path": "m", "pipeline_parallel_size": 3, "split_points": [6, 12]}).split_points == (
        6,
        12,
    )


def test_config_is_frozen() -> None:
    config = parse_config({"model_path": "m"})
    with pytest.raises(ValidationError, match="frozen"):
        config.block_size = 8  # type: ignore[misc]
    assert config.block_size == 16


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("tp_sise", ""),
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("max_batched_tokens", "max_num_batched_tokens"),
        ("kv_cache_memry", "kv_cache_memory"),
        ("threads", "num_threads"),
        (7, ""),
    ],
)
def test_unknown_key_is_named_with_the_nearest_known_one(key: Any, nearest: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config({"model_path": "m", key: 2})
    advice = f": did you mean {nearest!r}?" if nearest else ""
    assert str(refusal.value) == f"unknown key {key!r} in the handler section{advice}"


def test_unknown_key_inside_a_key_is_named_with_where_it_is() -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config({"model_path": "m", "task": "encoder", "parallelism": {"preproces": 2}}, BatchConfig)
    assert str(refusal.value) == "unknown key 'preproces' in handler.parallelism: did you mean 'preprocess'?"


@pytest.mark.parametrize(("key", "kind"), [("task", HandlerConfig), ("max_num_seqs", BatchConfig)])
def test_key_of_the_other_handler_is_unknown(key: str, kind: type[ModelConfig]) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
        parse_config({"model_path": "m", key: 2}, kind)


def test_nothing_is_meant_where_nothing_is_near() -> None:
    assert did_you_mean("zzz", HandlerConfig.model_fields) == ""


@pytest.mark.parametrize("section", [None, [], "model_path: m", 5])
def test_missing_section_is_said_with_what_it_needs(section: Any) -> None:
    with pytest.raises(ConfigError, match="has no `handler:` section; it needs at least `model_path`"):
        parse_config(section)


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config({"block_size": 8})
    assert str(refusal.value) == "handler key 'model_path': Field required"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model_path", 3, "valid string"),
        ("model_path", None, "valid string"),
        ("tensor_parallel_size", "two", "valid integer"),
        ("tensor_parallel_size", 0, "greater than or equal to 1"),
        ("tensor_parallel_size", 1.5, "valid integer"),
        ("pipeline_parallel_size", 0, "greater than or equal to 1"),
        ("split_points", "6,12", "valid tuple"),
        ("eager", "perhaps", "valid boolean"),
        ("enable_expert_parallel", 2, "valid boolean"),
        ("config_path", 3, "valid string"),
        ("gpu_memory_utilization", 1.5, "less than or equal to 1"),
        ("dtype", "float64", "'auto', 'float32', 'bfloat16' or 'float16'"),
        ("dtype", 16, "'auto', 'float32', 'bfloat16' or 'float16'"),
        ("device", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("max_model_len", 1, "greater than or equal to 2"),
        ("max_num_seqs", 0, "greater than or equal to 1"),
        ("max_num_batched_tokens", 0, "greater than or equal to 1"),
        ("block_size", -16, "greater than or equal to 1"),
        ("block_size", [16], "valid integer"),
        ("kv_cache_memory", 0, "greater than or equal to 1"),
        ("kv_cache_memory", None, "valid integer"),
        ("num_threads", 0, "greater than or equal to 1"),
        ("max_step_seconds", 0, "greater than 0"),
    ],
)
def test_value_that_does_not_fit_is_shown_with_its_key(key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        parse_config({"model_path": "m", key: value})
    assert str(refusal.value).startswith(f"handler key {key!r}: ")
    assert str(refusal.value).endswith(f", got {value!r}")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("task", "translation", "'text_embedding', 'text_classification', 'token_classification', .* or 'encoder'"),
        ("micro_batch_size", 0, "greater than or equal to 1"),
        ("virtual_stages", 0, "greater than or equal to 1"),
        ("max_items", 0, "greater than or equal to 1"),
        ("parallelism", 2, "valid dictionary"),
        ("parallelism.preprocess", 0, "greater than or equal to 1"),
        ("parallelism.postprocess", 1.5, "valid integer"),
    ],
)
def test_value_of_batch_inference_that_does_not_fit_is_shown_with_its_key(key: str, value: Any, says: str) -> None:
    name, _, inner = key.partition(".")
    section = {"model_path": "m", "task": "encoder", name: {inner: value} if inner else value}
    with pytest.raises(ConfigError, match=says) as refusal:
        parse_config(section, BatchConfig)
    assert str(refusal.value).startswith(f"handler key {key!r}: ")
    assert str(refusal.value).endswith(f", got {value!r}")


def test_task_has_no_default() -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config({"model_path": "m"}, BatchConfig)
    assert str(refusal.value) == "handler key 'task': Field required"


@pytest.mark.parametrize("points", [[0, 4], [6, 4], [4, 4], [-1, 4]])
def test_split_points_that_do_not_increase_from_1_are_shown(points: list[int]) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config({"model_path": "m", "pipeline_parallel_size": 3, "split_points": points})
    assert str(refusal.value).startswith("handler key 'split_points': ")
    assert "increase from 1" in str(refusal.value)
    assert str(refusal.value).endswith(f", got {points}")


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (HandlerConfig, {}, "pipeline_parallel_size 1 makes 1 stages, which need 0 split points, got 1: [6]"),
        (
            HandlerConfig,
            {"pipeline_parallel_size": 3},
            "pipeline_parallel_size 3 makes 3 stages, which need 2 split points, got 1: [6]",
        ),
        (
            BatchConfig,
            {"task": "encoder", "pipeline_parallel_size": 2, "virtual_stages": 2},
            "pipeline_parallel_size 2 × virtual_stages 2 makes 4 stages, which need 3 split points, got 1: [6]",
        ),
    ],
)
def test_another_number_of_split_points_than_the_stages_need_is_refused(
    kind: type[ModelConfig], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config({"model_path": "m", "split_points": [6], **changes}, kind)
    assert str(refusal.value) == f"handler key 'split_points': {says}"


@pytest.mark.parametrize(
    ("other", "message"),
    [({"device": "cpu"}, "device cpu has no GPU: set kv_cache_memory"), ({"kv_cache_memory": 5}, "0.9 and .* 5 both")],
)
def test_part_of_a_gpu_is_refused_beside_what_contradicts_it(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"'gpu_memory_utilization': {message}"):
        parse_config({"model_path": "m", "gpu_memory_utilization": 0.9, **other})


def test_eager_is_refused_over_several_stages() -> None:
    with pytest.raises(ConfigError, match=r"'eager': .* set pipeline_parallel_size, got 2, to 1, or eager to false"):
        parse_config({"model_path": "m", "eager": True, "pipeline_parallel_size": 2})


@pytest.mark.parametrize("key", ["tensor_parallel_size", "pipeline_parallel_size", "kv_cache_memory", "num_threads"])
def test_yes_is_not_a_number(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config({"model_path": "m", key: True})


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("7b", 7),
        ("1kB", 10**3),
        ("512MB", 512 * 10**6),
        ("2gb", 2 * 10**9),
        ("1KiB", 2**10),
        ("64MiB", 64 * 2**20),
        ("1.5GiB", 3 * 2**29),
        (" 2 GiB ", 2 * 2**30),
        ("0.0000015MB", 1),
    ],
)
def test_size_is_a_number_of_bytes_or_has_a_unit(text: Any, num_bytes: int) -> None:
    assert parse_config({"model_path": "m", "kv_cache_memory": text}).kv_cache_memory == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "lots", "-1GiB", "2 GiB or so", "2TiB", "1ki", "2,5GB", "1e9"])
def test_text_that_is_no_size_is_shown_with_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match=r"'kv_cache_memory': .* is not a size; write .* like '2GiB'") as refusal:
        parse_config({"model_path": "m", "kv_cache_memory": text})
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize("text", ["1.2.3GiB", ".", "9" * 400])
def test_number_that_is_none_is_no_size_either(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_config({"model_path": "m", "kv_cache_memory": text})


def test_size_smaller_than_a_byte_is_outside_the_limits() -> None:
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        parse_config({"model_path": "m", "kv_cache_memory": "0.5b"})


@pytest.mark.parametrize("value", [5, 2.5, None, [1]])
def test_value_that_is_no_text_is_left_for_pydantic_to_judge(value: object) -> None:
    assert parse_bytes(value) is value


def test_paths_are_those_of_the_unpacked_archive() -> None:
    section = {"model_path": "weights", "config_path": "settings", "adapter_path": "/lora"}
    config = parse_config(section).located_in(Path("/archive"))
    assert (config.model_path, config.adapter_path) == ("/archive/weights", "/lora")
    assert config.config_folder == Path("/archive/settings")
    bare = parse_config({"model_path": "."}).located_in(Path("/archive"))
    assert (bare.adapter_path, bare.config_path, bare.config_folder) == (None, None, None)


def test_adapter_of_an_eager_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'adapter_path': 'lora' .* set eager to false"):
        parse_config({"model_path": "m", "adapter_path": "lora", "eager": True})


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"device": "cuda"}, "int8 is for device cpu, not cuda: leave quantization out"),
        ({"dtype": "float32"}, "int8 is of bfloat16 or float16 weights, not float32: set dtype to bfloat16"),
        ({"eager": True}, "int8 is for a traced model, not its own modules: set eager to false"),
        ({"quantization": "int3"}, "Input should be 'int8' or 'int4', got 'int3'"),
    ],
)
def test_quantization_that_nothing_could_multiply_is_refused(settings: dict[str, Any], advice: str) -> None:
    for dtype in ("bfloat16", "float16"):
        assert parse_config({"model_path": "m", "quantization": "int8", "dtype": dtype}).quantization == "int8"
    with pytest.raises(ConfigError, match=f"'quantization': {advice}$"):
        parse_config({"model_path": "m", "quantization": "int8", **settings})
