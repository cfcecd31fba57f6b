"""The command as its users run it: a process of its own, its output, its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest
import yaml
from http_client import get

from ts_parallel.cli.torchserve import find_java, free_ports, is_loopback
from ts_parallel.errors import StartupError

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"
COMMAND = str(Path(sys.executable).parent / "ts-parallel")


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160", "HF_HUB_OFFLINE": "1", **changes}
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=180, env=environment)


def test_plan_shows_placements_bytes_and_kv_tokens() -> None:
    result = run("plan", str(DEMO_MODEL), "--tensor-parallel-size", "2", "--kv-cache-memory", "1MB")
    assert result.returncode == 0, result.stderr
    assert "model.embed_tokens.weight = lm_head.weight" in result.stdout
    assert "dim 0 in 1024+1024" in result.stdout
    assert "replicated" in result.stdout
    # 6 layers × 1 key/value head × (40 + 40) × 2 bytes = 960 bytes a token
    assert "1,041" in result.stdout


def test_plan_that_cannot_be_made_is_one_line_and_status_1() -> None:
    result = run("plan", str(DEMO_MODEL), "--tensor-parallel-size", "3")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "tensor_parallel_size must be one of [1, 2, 4]" in result.stderr


@pytest.mark.ranks
def test_verify_finds_the_demo_model_equal_at_two_ranks() -> None:
    result = run("verify", str(DEMO_MODEL), "--tensor-parallel-size", "2", "--max-tokens", "16")
    assert result.returncode == 0, result.stderr
    assert "the same tokens" in result.stdout


@pytest.mark.ranks
def test_verify_says_no_with_its_status() -> None:
    """bfloat16 ranks round their sums elsewhere than the plain model does, so long answers part sooner or later."""
    result = run("verify", str(DEMO_MODEL), "--tensor-parallel-size", "4", "--dtype", "bfloat16", "--max-tokens", "256")
    assert result.returncode == 1
    assert "DIFFERENT tokens" in result.stdout


def test_archive_names_the_folder_and_holds_the_handler(tmp_path: Path) -> None:
    result = run(
        "archive", str(DEMO_MODEL), "--tensor-parallel-size", "2", "--export-path", str(tmp_path), "--name", "d"
    )
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(tmp_path / "d.mar") as archive:
        settings = yaml.safe_load(archive.read("model-config.yaml"))
        manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
    assert settings["handler"]["model_path"] == str(DEMO_MODEL)
    assert settings["torchrun"]["nproc-per-node"] == 2
    assert manifest["model"]["handler"] == "text_generation.py"


def test_hub_id_without_a_network_is_one_line() -> None:
    result = run("plan", "nobody/no-such-model")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "nobody/no-such-model is no folder" in result.stderr


@pytest.mark.torchserve
def test_serve_says_when_it_is_ready_and_ends_its_server_on_sigterm() -> None:
    port = free_ports(1)[0]
    command = [COMMAND, "serve", str(DEMO_MODEL), "--name", "demo", "--tensor-parallel-size", "2", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line == f"ready: http://127.0.0.1:{port}/predictions/demo\n", process.stderr.read()
            assert get(f"http://127.0.0.1:{port}/predictions/demo/1.0/health")[0] == 200
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert len(children) > 3  # the launcher, Java, torchrun and its ranks
    gone, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


@pytest.mark.torchserve
def test_serve_asks_for_a_key_on_other_hosts_than_loopback() -> None:
    port = free_ports(1)[0]
    command = [COMMAND, "serve", str(DEMO_MODEL), "--name", "demo", "--host", "0.0.0.0", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline().startswith("ready"), process.stderr.read()
            assert "key" in process.stdout.readline()
            assert get(f"http://127.0.0.1:{port}/predictions/demo/1.0/health")[0] == 400  # TorchServe's: no key
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_serve_refuses_a_missing_file_with_one_line_and_status_1(tmp_path: Path) -> None:
    for file in DEMO_MODEL.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    result = run("serve", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "model.safetensors" in result.stderr


def test_serve_refuses_a_cut_off_file_with_one_line_and_status_1(tmp_path: Path) -> None:
    for file in DEMO_MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    os.truncate(tmp_path / "model.safetensors", 1_000_000)
    result = run("serve", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "is cut off" in result.stderr


def test_serve_refuses_more_than_fits() -> None:
    result = run("serve", str(DEMO_MODEL), "--kv-cache-memory", "100kB")
    assert result.returncode == 1
    assert "raise kv_cache_memory or lower max_model_len" in result.stderr


def test_missing_java_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartupError, match="JAVA_HOME"):
        find_java()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("example.org", False),
    ],
)
def test_loopback_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
