"""The command as its users run it: a process of its own, its output, its exit status."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from families import FAMILIES
from http_client import JSON, get, post
from places import DEMO_MODEL
from programs import keep_for_ranks
from typer.testing import CliRunner

from ts_parallel.cli.main import app, main
from ts_parallel.cli.plan import plan
from ts_parallel.cli.server import torchserve
from ts_parallel.cli.server.serve import serve
from ts_parallel.cli.server.torchserve import find_java, free_ports
from ts_parallel.errors import ConfigError, StartupError
from ts_parallel.partition.prepared import CACHE_VARIABLE

COMMAND = str(Path(sys.executable).parent / "ts-parallel")


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160", "HF_HUB_OFFLINE": "1", **changes}
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=180, env=environment)


class RunHere:
    """The same in this process: most of the time of a refusal goes into imports."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self._monkeypatch.setenv("COLUMNS", "160")
        self._monkeypatch.setattr(sys, "argv", [COMMAND, *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        shown = self._capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(end.value.code or 0), shown.out, shown.err)


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunHere:
    return RunHere(capsys, monkeypatch)


def test_plan_shows_placements_bytes_and_kv_tokens() -> None:
    result = run("plan", str(DEMO_MODEL), "-tp", "2", "--dtype", "bfloat16", "--kv-cache-memory", "1MB")
    assert result.returncode == 0, result.stderr
    assert "model.embed_tokens.weight = lm_head.weight" in result.stdout
    assert "dim 0 in 1024+1024" in result.stdout
    assert "replicated" in result.stdout
    # 6 layers × 1 key/value head × (40 + 40) × 2 bytes = 960 bytes a token
    assert "1,041" in result.stdout


def rows_of(output: str, header: str) -> list[list[str]]:
    """The cells of the table whose header line begins with `header`, row by row."""
    lines = iter(output.splitlines())
    next(line for line in lines if line.split()[:2] == header.split()[:2])
    next(lines)  # the rule below it
    return [line.split() for line in itertools.takewhile(str.strip, lines)]


def test_plan_shows_which_stage_each_layer_is_in_and_what_it_weighs(run_here: RunHere) -> None:
    result = run_here("plan", str(DEMO_MODEL), "-pp", "2", "-tp", "2", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    stages = {row[0]: row[2] for row in rows_of(result.stdout, "parameter shape") if "layers" in row[0]}
    assert {name: int(name.split(".")[2]) // 3 for name in stages} == {name: int(at) for name, at in stages.items()}
    assert "2048×160   0, 1 " in result.stdout  # the first stage embeds with what is the last one's head
    ranks = rows_of(result.stdout, "rank stage")
    assert [row[:3] for row in ranks] == [["0", "0", "0–2"], ["1", "0", "0–2"], ["2", "1", "3–5"], ["3", "1", "3–5"]]
    shares = [int(row[4].removesuffix("%")) for row in ranks]
    assert shares[0] == shares[1] and shares[2] == shares[3]
    assert shares[0] + shares[2] == 100
    assert [row[5] for row in ranks] == ["480"] * 4  # 3 layers × 1 key/value head × (40 + 40) × 2 bytes


def test_plan_cuts_where_it_is_told_to(run_here: RunHere) -> None:
    result = run_here("plan", str(DEMO_MODEL), "-pp", "3", "--split-points", "1,5", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    ranks = rows_of(result.stdout, "rank stage")
    assert [row[:3] for row in ranks] == [["0", "0", "0–0"], ["1", "1", "1–4"], ["2", "2", "5–5"]]
    assert [row[5] for row in ranks] == ["320", "1,280", "320"]
    assert sum(int(row[4].removesuffix("%")) for row in ranks) in (99, 100, 101)  # each is rounded


IMPOSSIBLE_SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"tensor_parallel_size": 5}, "tensor_parallel_size must be one of [1, 2, 3, 4]"),
    ({"pipeline_parallel_size": 7}, "6 layers cannot be cut into 7 stages"),
    ({"pipeline_parallel_size": 2, "split_points": "6"}, "must rise from 1 to at most 5, as the model has 6 layers"),
    ({"pipeline_parallel_size": 2, "split_points": "2,4"}, "need 1 split points, got 2: [2, 4]"),
    ({"pipeline_parallel_size": 2, "split_points": "three"}, "'three' is no list of layers"),
]


@pytest.mark.parametrize(("settings", "says"), IMPOSSIBLE_SHAPES)
@pytest.mark.parametrize("command", [plan, serve])  # neither gets so far as to start anything
def test_shape_that_cannot_be_is_refused_on_one_line(
    command: Callable[..., None], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(StartupError) as refusal:
        command(str(DEMO_MODEL), **settings)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_plan_shows_which_experts_are_kept_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    FAMILIES["mixtral"](num_hidden_layers=1, num_local_experts=5).save_pretrained(tmp_path)
    plan(str(tmp_path), tensor_parallel_size=2, enable_expert_parallel=True)
    shown = capsys.readouterr().out.splitlines()
    assert sum("dim 0 in 3+2, whole experts" in line for line in shown if ".experts." in line) == 2
    assert sum("whole experts" in line for line in shown) == 2


def test_plan_that_cannot_be_made_is_one_line_and_status_1(run_here: RunHere) -> None:
    result = run_here("plan", str(DEMO_MODEL), "--pipeline-parallel-size", "2", "--split-points", "6")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "split_points [6]" in result.stderr


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ("--tensor-parallel-size 2 --eager", "tensor_parallel_size 2 × pipeline_parallel_size 1, float32, eager"),
        ("--pipeline-parallel-size 2 --split-points 2", "tensor_parallel_size 1 × pipeline_parallel_size 2, float32"),
        (
            "--tensor-parallel-size 2 --pipeline-parallel-size 2",
            "tensor_parallel_size 2 × pipeline_parallel_size 2, float32",
        ),
    ],
)
def test_verify_finds_the_demo_model_equal(arguments: str, shape: str) -> None:
    if "pipeline" in arguments:
        points = {"split_points": (2,)} if "split-points" in arguments else {"tensor_parallel_size": 2}
        keep_for_ranks(DEMO_MODEL, {"dtype": "float32", "pipeline_parallel_size": 2, **points})
    result = run("verify", str(DEMO_MODEL), *arguments.split(), "--max-tokens", "16")
    assert result.returncode == 0, result.stderr
    assert f"{shape}: the same tokens" in result.stdout
    assert result.stdout.count("16 of 16") == 8


@pytest.mark.ranks
def test_verify_says_no_with_its_status() -> None:
    """bfloat16 ranks round their sums elsewhere than the plain model does, so long answers part sooner or later."""
    keep_for_ranks(DEMO_MODEL, {"dtype": "bfloat16", "tensor_parallel_size": 2})
    result = run("verify", str(DEMO_MODEL), "--tensor-parallel-size", "2", "--dtype", "bfloat16", "--max-tokens", "64")
    assert result.returncode == 1
    assert "DIFFERENT tokens" in result.stdout


def test_verify_of_the_models_own_modules_in_several_stages_is_refused(run_here: RunHere) -> None:
    result = run_here("verify", str(DEMO_MODEL), "--pipeline-parallel-size", "2", "--eager")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "run in one stage only" in result.stderr


def test_archive_names_the_folder_and_holds_the_handler(tmp_path: Path, run_here: RunHere) -> None:
    shape = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2", "--split-points", "2"]
    result = run_here("archive", str(DEMO_MODEL), *shape, "--export-path", str(tmp_path), "--name", "d")
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(tmp_path / "d.mar") as archive:
        settings = yaml.safe_load(archive.read("model-config.yaml"))
        manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
    assert settings["handler"]["model_path"] == str(DEMO_MODEL)
    assert settings["handler"]["split_points"] == [2]
    assert settings["torchrun"]["nproc-per-node"] == 4
    assert manifest["model"]["handler"] == "text_generation.py"


def test_hub_id_without_a_network_is_one_line() -> None:
    result = run("plan", "nobody/no-such-model")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "nobody/no-such-model is no folder" in result.stderr


@pytest.mark.parametrize("option", ["max_request_size", "max_response_size"])
@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("much", "'much' is not a size"),
        ("1kB", "1kB is not between 65536 and 2147483647 bytes"),
        ("2GiB", "2GiB is not between 65536 and 2147483647 bytes"),
    ],
)
def test_serve_refuses_a_size_that_torchserve_cannot_work_with(option: str, size: str, says: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        serve(str(DEMO_MODEL), **{option: size})
    assert str(refusal.value).startswith(f"--{option.replace('_', '-')}") and says in str(refusal.value)


PHASES = [
    "tracing the model",
    "starting TorchServe",
    "starting the ranks",
    "loading the weights",
    "making ready to answer",
]


@pytest.mark.torchserve
def test_serve_says_what_it_is_at_and_when_it_is_ready_and_ends_its_server_on_sigterm(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    shape = ["--pipeline-parallel-size", "2", "--split-points", "2", "--max-response-size", "64KiB"]
    command = [COMMAND, "serve", str(DEMO_MODEL), "--name", "demo", *shape, "--port", str(port)]
    environment = {**os.environ, CACHE_VARIABLE: str(tmp_path)}  # it was never traced before
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            shown = os.read(process.stderr.fileno(), 65536).decode() if line else process.stderr.read()
            assert line == f"ready: http://127.0.0.1:{port}/predictions/demo\n", shown
            assert get(f"http://127.0.0.1:{port}/predictions/demo/1.0/health")[0] == 200
            status, text = post(f"http://127.0.0.1:{port}/predictions/demo/1.0/tokenize", {"prompt": "a " * 40_000})
            assert status == 413 and "TorchServe takes 65536 at most" in text
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    phases = [line.partition(" s  ")[2] for line in shown.splitlines()]
    assert [phase for phase in phases if phase in PHASES] == PHASES
    assert len(phases) < 20
    assert len(children) > 3  # the launcher, Java, torchrun and its ranks
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


@pytest.mark.torchserve
def test_serve_asks_for_a_key_on_other_hosts_than_loopback_and_it_works_for_as_long_as_the_server_lives() -> None:
    keep_for_ranks(DEMO_MODEL, {})
    port = free_ports(1)[0]
    command = [COMMAND, "serve", str(DEMO_MODEL), "--name", "demo", "--host", "0.0.0.0", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline().startswith("ready"), process.stderr.read()
            key_file = Path(process.stdout.readline().removeprefix("clients need the inference key of ").strip())
            assert get(f"http://127.0.0.1:{port}/predictions/demo/1.0/health")[0] == 400  # TorchServe's: no key
            keys = json.loads(key_file.read_text())
            headers = {**JSON, "Authorization": f"Bearer {keys['inference']['key']}"}
            body = {"prompt": "return", "max_tokens": 1}
            assert post(f"http://127.0.0.1:{port}/predictions/demo", body, headers)[0] == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    ends = {name: key["expiration time"] for name, key in keys.items() if "expiration time" in key}
    assert ends.keys() == {"management", "inference"}
    assert min(map(year_of, ends.values())) > datetime.now(UTC).year + 100  # no server lives as long as its keys


def year_of(moment: str) -> int:
    return datetime.fromisoformat(f"{moment.partition('.')[0]}+00:00").year  # Java counts in nanoseconds


def test_serve_refuses_a_missing_file_with_one_line_and_status_1(tmp_path: Path, run_here: RunHere) -> None:
    for file in DEMO_MODEL.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    result = run_here("serve", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "model.safetensors" in result.stderr


def test_serve_refuses_a_cut_off_file_with_one_line_and_status_1(tmp_path: Path, run_here: RunHere) -> None:
    for file in DEMO_MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    os.truncate(tmp_path / "model.safetensors", 1_000_000)
    result = run_here("serve", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "is cut off" in result.stderr


def test_serve_refuses_more_than_fits(run_here: RunHere) -> None:
    result = run_here("serve", str(DEMO_MODEL), "--kv-cache-memory", "100kB")
    assert result.returncode == 1
    assert "or lower max_model_len" in result.stderr


def test_ports_are_such_as_the_kernel_hands_to_nobody_until_the_server_has_them() -> None:
    first_handed_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = free_ports(7)
    assert len(set(ports)) == 7
    assert first_handed_out < 11000 or max(ports) < first_handed_out


def test_port_is_given_to_one_alone_before_anybody_listens_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setattr(torchserve, "_ports_not_handed_out", lambda: iter([port] * 3))
    with pytest.raises(StartupError, match="no 1 free ports"):
        free_ports(1)
    own = f"from ts_parallel.cli.server import torchserve; torchserve._claim({port})"
    other = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True)
    assert "Address already in use" in other.stderr


def test_missing_java_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartupError, match="JAVA_HOME"):
        find_java()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--api-key", "a b"], "--api-key"),
        (["--api-key", ","], "--api-key"),
        (["--cors-origin", "chat.example"], "--cors-origin 'chat.example'"),
        (["--cors-origin", "https://a.example,https://b.example"], "--cors-origin"),
        (["--cors-origin", "https://a.example/path"], "--cors-origin"),
    ],
)
def test_key_and_origin_that_no_client_can_have_end_the_command(options: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["serve", str(DEMO_MODEL), *options])
    assert result.exit_code != 0
    assert isinstance(result.exception, ConfigError) and says in str(result.exception)
    assert "a b" not in str(result.exception)
