"""Every key of the `handler:` section is an option too, with the same limits, and reaches the archive."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import DEMO_MODEL
from typer.testing import CliRunner, Result

from ts_parallel.cli.main import app
from ts_parallel.cli.server import serve
from ts_parallel.config import HandlerConfig, parse_config
from ts_parallel.errors import ConfigError

KEYS = HandlerConfig.model_fields.keys() - {"model_path"}

Case = tuple[list[str], Any]
"""Arguments, and what they make of the key."""

CASES: dict[str, Case] = {
    "tensor_parallel_size": (["--tensor-parallel-size", "2"], 2),
    "split_points": (["--split-points", "2,4"], [2, 4]),
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
    "device": (["--device", "cpu"], "cpu"),
    "config_path": (["--config", str(DEMO_MODEL)], str(DEMO_MODEL)),
    "adapter_path": (["--adapter", str(DEMO_MODEL.parent)], str(DEMO_MODEL.parent)),
    "enable_expert_parallel": (["--enable-expert-parallel"], True),
    "quantization": (["--quantization", "int4"], "int4"),
    "kv_cache_memory": (["--kv-cache-memory", "1GiB"], 2**30),
    "enable_prefix_caching": (["--no-enable-prefix-caching"], False),
    "max_prefill_slowdown": (["--max-prefill-slowdown", "2.5"], 2.5),
    "stream_interval": (["--stream-interval", "0.5"], 0.5),
    "served_model_name": (["--served-model-name", "gpt-4o,demo"], "gpt-4o,demo"),
    "strict": (["--strict"], True),
    "clamp_max_tokens": (["--clamp-max-tokens"], True),
    "chat_format": (["--chat-format", "hermes"], "hermes"),
    "split_reasoning": (["--no-split-reasoning"], False),
}
OTHERS: dict[str, Case] = {  # they do not go together with some of the first
    "device": (["--device", "cuda"], "cuda"),
    "gpu_memory_utilization": (["--gpu-memory-utilization", "0.5"], 0.5),
    "eager": (["--eager"], True),
}


def case_of(key: str) -> Case:
    return CASES.get(key, ([f"--{key.replace('_', '-')}", "3"], 3))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


class Recorder:
    """In TorchServe's place: what it would be given to serve."""

    url, key_file = "", None
    handler: dict[str, Any]

    def __init__(self, workspace: Path, store: Path, name: str, *_: Any, **__: Any) -> None:
        self._archive = store / f"{name}.mar"

    def start(self) -> None:
        Recorder.handler = handler_of(self._archive)

    def wait_until_ready(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def drain(self, *_: Any) -> int:
        return 0

    def stop(self) -> None: ...


def handler_of(file: Path) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        handler: dict[str, Any] = yaml.safe_load(archive.read("model-config.yaml"))["handler"]
    return handler


@pytest.fixture(params=["archive", "serve"])
def command(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run it on the demo model and return the handler section of the archive that it wrote."""
    monkeypatch.setattr(serve, "check", lambda *_: None)
    monkeypatch.setattr(serve, "find_java", lambda: None)
    monkeypatch.setattr(serve, "TorchServe", Recorder)

    def call(*arguments: str) -> dict[str, Any]:
        where = ["--export-path", str(tmp_path)] if request.param == "archive" else []
        result = run(request.param, str(DEMO_MODEL), "--name", "d", *where, *arguments)
        assert result.exit_code == 0, result.exception or result.output
        return handler_of(tmp_path / "d.mar") if where else Recorder.handler

    return call


def test_every_key_has_its_option_and_reaches_the_archive(command: Any) -> None:
    first = {key: case_of(key) for key in KEYS - OTHERS.keys() | {"device"}}
    assert first.keys() | OTHERS.keys() == KEYS
    for cases in (first, OTHERS):
        handler = command(*(argument for arguments, _ in cases.values() for argument in arguments))
        assert {key: handler[key] for key in cases} == {key: value for key, (_, value) in cases.items()}
        assert not [key for key, (_, value) in cases.items() if HandlerConfig.model_fields[key].default == value]
        parse_config(handler)  # as a worker reads it


def test_sizes_have_short_options(command: Any) -> None:
    handler = command("-tp", "2", "-pp", "3")
    assert (handler["tensor_parallel_size"], handler["pipeline_parallel_size"]) == (2, 3)


WRONG: list[tuple[str, str, Any]] = [
    ("max_num_seqs", "0", 0),
    ("max_num_batched_tokens", "many", "many"),
    ("num_threads", "2.5", 2.5),
    ("gpu_memory_utilization", "1.5", 1.5),
    ("stream_interval", "-1", -1),
    ("kv_cache_memory", "lots", "lots"),
    ("dtype", "float8", "float8"),
    ("quantization", "int3", "int3"),
]


@pytest.mark.parametrize(("key", "text", "value"), WRONG)
@pytest.mark.parametrize("command", ["archive", "serve"])
def test_wrong_value_is_refused_as_yaml_is_but_by_the_options_name(
    command: str, key: str, text: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as of_yaml:
        parse_config({"model_path": "m", key: value})
    option = "--" + key.replace("_", "-")
    refusal = run(command, str(DEMO_MODEL), option, text).exception
    assert isinstance(refusal, ConfigError)
    assert str(refusal) == str(of_yaml.value).replace(f"handler key {key!r}", option)


def test_options_that_do_not_go_together_are_named() -> None:
    refusal = run("archive", str(DEMO_MODEL), "--eager", "-pp", "2").exception
    assert isinstance(refusal, ConfigError)
    assert str(refusal).startswith("--eager: ")


def test_model_of_a_part_of_a_gpu_is_named_no_other_size(command: Any) -> None:
    handler = command("--device", "cuda", "--gpu-memory-utilization", "0.9")
    assert "kv_cache_memory" not in handler
