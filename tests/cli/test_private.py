"""What a server keeps to itself: prompts and keys stand in no log and no file, which no other user reads either."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from deployment import wait_until
from gateway_process import COMMAND
from serve_process import chat_folder

from ts_parallel.cli.server.torchserve import free_ports

pytestmark = pytest.mark.torchserve

KEY, WRONG, PROMPT = "sk-mine-4f1d", "sk-wrong-77aa", "zxqvprompt"
_FOR_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class Private:
    direct: str
    gateway: str
    output: Path
    temporary: Path
    process: psutil.Popen


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Private]:
    """With all that it can say of itself, in a temporary folder that everybody may enter."""
    own = tmp_path_factory.mktemp("p")
    temporary, output = own / "t", own / "output"
    temporary.mkdir()
    temporary.chmod(0o755)
    port, gateway_port = free_ports(2)
    command = [COMMAND, "serve", str(chat_folder(own / "model")), "--name", "demo", "--dtype", "float32", "--verbose"]
    command += [
        "--device",
        "cpu",
        "--kv-cache-memory",
        "32MiB",
        "--port",
        str(port),
        "--gateway-port",
        str(gateway_port),
    ]
    variables = {**os.environ, "TMPDIR": str(temporary), "TS_PARALLEL_API_KEY": KEY}
    with output.open("wb") as file:
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables, umask=0o022)
    try:
        wait_until(lambda: "\ngateway: " in output.read_text(), lambda: output.read_text()[-3000:])
        direct = f"http://127.0.0.1:{port}/predictions/demo/1.0"
        yield Private(direct, f"http://127.0.0.1:{gateway_port}", output, temporary, process)
    finally:
        family = [*process.children(recursive=True), process]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=60)
        for one in alive:
            one.kill()


def ask_all(served: Private) -> list[int]:
    """With the prompt in each place that a message could repeat: right, wrong, cut off, of no route."""
    bodies = [
        ("v1/completions", {"prompt": PROMPT, "max_tokens": 2, "stream": True}),
        ("v1/completions", {"prompt": PROMPT, "max_tokens": PROMPT}),
        ("v1/completions", {"prompt": [PROMPT], "max_tokens": 2, "stop": [PROMPT]}),
        ("v1/completions", {"prompt": PROMPT, "guided_json": {"type": PROMPT}}),
        ("v1/completions", {"prompt": PROMPT * 4000}),
        ("v1/chat/completions", {"messages": [{"role": PROMPT, "content": PROMPT}], "max_tokens": 2}),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": {"type": PROMPT}}]}),
        ("tokenize", {"prompt": PROMPT}),
        ("nowhere", {"prompt": PROMPT}),
    ]
    statuses = []
    for base in (served.direct, served.gateway):
        for key in (KEY, WRONG):
            headers = {"Authorization": f"Bearer {key}"}
            for route, body in bodies:
                statuses.append(httpx.post(f"{base}/{route}", json=body, headers=headers, timeout=60).status_code)
            cut = f'{{"prompt": "{PROMPT}'.encode()
            kind = {**headers, "Content-Type": "application/json"}
            statuses.append(httpx.post(f"{base}/v1/completions", content=cut, headers=kind, timeout=60).status_code)
    return statuses


def test_no_prompt_and_no_key_is_in_any_log_or_file(served: Private) -> None:
    statuses = ask_all(served)
    assert {200, 400, 401, 404} <= set(statuses) and max(statuses) < 500
    files = [served.output, *(own for own in served.temporary.rglob("*") if own.is_file())]
    assert any(own.name == "model_log.log" for own in files)  # which all of a rank's lines are in
    told = {(own.name, word) for own in files for word in (KEY, WRONG, PROMPT) if word.encode() in own.read_bytes()}
    assert told == set()
    for process in (served.process, *served.process.children(recursive=True)):
        assert KEY not in " ".join(process.cmdline())


def test_no_other_user_reads_its_files(served: Private) -> None:
    """Each lies in a folder that only its owner may enter, or is its owner's alone."""
    found = list(served.temporary.rglob("*"))
    assert len(found) > 5
    open_to_others = [own for own in found if not own.is_symlink() and is_open(own, served.temporary)]
    assert open_to_others == []


def is_open(path: Path, top: Path) -> bool:
    between = [path, *path.parents]
    between = between[: between.index(top)]
    return all(own.lstat().st_mode & _FOR_OTHERS for own in between)


def test_no_process_has_a_socket_or_an_open_file_that_others_reach(served: Private) -> None:
    user = os.getuid()
    for process in (served.process, *served.process.children(recursive=True)):
        for connection in process.net_connections(kind="unix"):
            path = Path(str(connection.laddr))
            if path.is_absolute() and path.exists() and path.stat().st_uid == user:
                assert served.temporary in path.parents and not is_open(path, served.temporary), path
        for file in process.open_files():
            if getattr(file, "mode", "r") != "r" and Path(file.path).exists():
                is_ours = served.temporary in Path(file.path).parents
                assert Path(file.path) == served.output or (is_ours and not is_open(Path(file.path), served.temporary))
