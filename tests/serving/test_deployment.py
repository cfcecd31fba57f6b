"""The README's own way: torch-model-archiver and torchserve by hand, with the files of handlers/ and model-configs/."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from http_client import get, stream

from ts_parallel.cli.archive import model_config
from ts_parallel.cli.torchserve import TorchServe, free_ports
from ts_parallel.config import parse_config
from ts_parallel.errors import StartupError

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "examples" / "demo_model"


def archive(store: Path, config_file: Path, extra_files: Path) -> None:
    """Exactly the README's call."""
    command = [str(Path(sys.executable).parent / "torch-model-archiver"), "--model-name", "demo", "--version", "1.0"]
    command += ["--handler", str(ROOT / "handlers" / "text_generation.py"), "--config-file", str(config_file)]
    command += ["--extra-files", f"{extra_files}/", "--export-path", str(store)]
    store.mkdir(exist_ok=True)
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def torchserve(workspace: Path) -> Iterator[TorchServe]:
    server = TorchServe(workspace, workspace / "store", "demo", "127.0.0.1", free_ports(1)[0], None)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def wait_until(holds: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "model-configs").glob("*.yaml")))
def test_model_config_is_valid_and_starts_as_many_ranks_as_it_uses(name: str) -> None:
    settings = yaml.safe_load((ROOT / "model-configs" / name).read_text())
    config = parse_config(settings["handler"])
    assert settings["torchrun"]["nproc-per-node"] == config.tensor_parallel_size
    assert settings.keys() == model_config(config).keys()  # `ts-parallel archive` writes the same keys


@pytest.mark.torchserve
def test_demo_model_is_served_as_the_readme_shows(tmp_path: Path) -> None:
    archive(tmp_path / "store", ROOT / "model-configs" / "tp2-cpu.yaml", DEMO_MODEL)
    with torchserve(tmp_path) as server:
        wait_until(lambda: is_healthy(server))
        pieces = [
            piece for _, piece in stream(server.url, {"prompt": "Return a new list containing", "max_tokens": 48})
        ]
        assert len(pieces) > 1
        assert {"the", "is", "a"} & set("".join(pieces).split())  # English, as the demo model was taught


def is_healthy(server: TorchServe) -> bool:
    try:
        return get(f"{server.url}/1.0/health")[0] == 200
    except OSError:
        return False


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


@pytest.mark.torchserve
@pytest.mark.parametrize("fault", [broken_checkpoint, wrong_number_of_ranks, unknown_key])
def test_workers_log_ends_in_one_clear_line(
    tmp_path: Path, fault: Callable[[Path], tuple[Path, dict[str, object], str]]
) -> None:
    folder, changes, says = fault(tmp_path)
    settings = yaml.safe_load((ROOT / "model-configs" / "tp2-cpu.yaml").read_text())
    settings["handler"] |= changes
    config_file = tmp_path / "model-config.yaml"
    config_file.write_text(yaml.safe_dump(settings))
    archive(tmp_path / "store", config_file, folder)
    log = tmp_path / "logs" / "model_log.log"
    with torchserve(tmp_path):
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
