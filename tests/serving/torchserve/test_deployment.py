"""The README's own way: torch-model-archiver and torchserve by hand, with the files of handlers/ and model-configs/."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from deployment import DEMO_MODEL, MODEL_CONFIGS, is_batch, on_the_cpu, served, starting, wait_until
from http_client import stream

from ts_parallel.cli.server.archive import handler_config, model_config, parallel_type
from ts_parallel.cli.server.torchserve import TorchServe
from ts_parallel.config import BatchConfig, HandlerConfig, parse_config
from ts_parallel.errors import StartupError


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_model_config_is_valid_and_starts_as_many_ranks_as_it_uses(name: str) -> None:
    settings = MODEL_CONFIGS[name]
    config = parse_config(settings["handler"], BatchConfig if is_batch(settings) else HandlerConfig)
    assert settings["torchrun"]["nproc-per-node"] == config.num_ranks
    assert settings["parallelType"] == parallel_type(config)
    assert settings["deviceType"] == {"cpu": "cpu", "cuda": "gpu"}[config.device]
    # `ts-parallel archive` writes the same keys; batches are TorchServe's own, which continuous batching is not.
    written = model_config(parse_config({"model_path": "m"})).keys()
    assert settings.keys() == written - ({"continuousBatching"} if is_batch(settings) else set())


@pytest.mark.parametrize(
    ("sizes", "expected"), [((1, 1), "tp"), ((2, 1), "tp"), ((1, 2), "pp"), ((2, 2), "pptp"), ((4, 2), "pptp")]
)
def test_torchserve_is_told_the_shape_and_the_ranks(sizes: tuple[int, int], expected: str) -> None:
    settings = {"tensor_parallel_size": sizes[0], "pipeline_parallel_size": sizes[1]}
    written = model_config(handler_config(DEMO_MODEL, "cpu", **settings))
    assert written["parallelType"] == expected
    assert written["torchrun"] == {"nproc-per-node": sizes[0] * sizes[1]}
    assert parse_config(written["handler"]) == handler_config(DEMO_MODEL, "cpu", **settings)


def test_written_split_points_are_read_again(tmp_path: Path) -> None:
    config = handler_config(DEMO_MODEL, "cpu", pipeline_parallel_size=3, split_points=(2, 4))
    assert parse_config(yaml.safe_load(yaml.safe_dump(model_config(config)))["handler"]) == config


STREAMING = [name for name, settings in MODEL_CONFIGS.items() if not is_batch(settings)]
SIZES = {"max_num_seqs", "max_num_batched_tokens", "kv_cache_memory"}


@pytest.mark.parametrize("name", [name for name in STREAMING if "-gpu" in name])
def test_gpus_have_the_same_settings_but_for_the_device_and_sizes(name: str) -> None:
    """So one of them, started on the CPU, speaks for all."""
    own, other = MODEL_CONFIGS[name], MODEL_CONFIGS[name.replace("-gpu", "-cpu")]
    assert {key for key in own | other if own.get(key) != other.get(key)} == {"batchSize", "deviceType", "handler"}
    mine, others = own["handler"], other["handler"]
    assert {key for key in mine | others if mine.get(key) != others.get(key)} == {"device"} | SIZES


@pytest.mark.torchserve
@pytest.mark.parametrize("name", [*(name for name in STREAMING if "-gpu" not in name), "tp2-gpu.yaml"])
def test_demo_model_is_served_as_the_readme_shows(tmp_path: Path, name: str) -> None:
    """Those of batch inference are started in test_batch_inference.py."""
    with served(tmp_path, on_the_cpu(MODEL_CONFIGS[name]), DEMO_MODEL) as server:
        pieces = [
            piece for _, piece in stream(server.url, {"prompt": "Return a new list containing", "max_tokens": 48})
        ]
        assert len(pieces) > 1
        assert {"the", "is", "a"} & set("".join(pieces).split())  # English, as the demo model was taught


def broken_checkpoint(tmp_path: Path) -> tuple[Path, dict[str, object], str]:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in DEMO_MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    os.truncate(folder / "model.safetensors", 1_000_000)
    return folder, {}, "is cut off"


def wrong_number_of_ranks(tmp_path: Path) -> tuple[Path, dict[str, object], str]:
    return DEMO_MODEL, {"tensor_parallel_size": 4}, "tensor_parallel_size 4 needs 4 ranks, torchrun started 2"


def unknown_key(tmp_path: Path) -> tuple[Path, dict[str, object], str]:
    return DEMO_MODEL, {"tensor_paralel_size": 2}, "did you mean 'tensor_parallel_size'"


def transport_that_loses_requests(tmp_path: Path) -> tuple[Path, dict[str, object], str]:
    return DEMO_MODEL, {"asyncCommunication": True}, "'asyncCommunication': TorchServe 0.12 never answers those"


@pytest.mark.torchserve
@pytest.mark.parametrize(
    "fault", [broken_checkpoint, wrong_number_of_ranks, unknown_key, transport_that_loses_requests]
)
def test_workers_log_ends_in_one_clear_line(
    tmp_path: Path, fault: Callable[[Path], tuple[Path, dict[str, object], str]]
) -> None:
    folder, changes, says = fault(tmp_path)
    settings = MODEL_CONFIGS["tp2-cpu.yaml"]
    log = tmp_path / "logs" / "model_log.log"
    of_torchserve = {key: value for key, value in changes.items() if key == "asyncCommunication"}
    handler = settings["handler"] | {key: changes[key] for key in changes.keys() - of_torchserve.keys()}
    with starting(tmp_path, {**settings, **of_torchserve, "handler": handler}, folder):
        wait_until(lambda: log.is_file() and "cannot start" in log.read_text())
        time.sleep(1)  # what would follow the line follows at once
        lines = [line.partition(" - ")[2] for line in log.read_text().splitlines()]
    last_of_first_worker = next(index for index, line in enumerate(lines) if "cannot start" in line)
    assert says in lines[last_of_first_worker]
    following = lines[last_of_first_worker + 1 :]
    assert not [line for line in following if "Traceback" in line or "Error" in line], following


def test_torchserve_says_which_port_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = TorchServe(tmp_path, tmp_path, "demo", "127.0.0.1", taken.getsockname()[1], None)
        with pytest.raises(StartupError, match=str(taken.getsockname()[1])):
            server.start()
