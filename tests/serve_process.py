"""`ts-parallel serve` with a gateway, as its users run it: the demo model with a chat template, in float32."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from places import DEMO_MODEL

from ts_parallel.cli.server.torchserve import free_ports

COMMAND = str(Path(sys.executable).parent / "ts-parallel")
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Served:
    direct: str
    """The model's own base URL, without `v1`."""
    gateway: str
    """The gateway's, without `v1`."""
    process: psutil.Popen

    def family(self, word: str) -> list[psutil.Process]:
        """Those of its processes whose command line has `word`."""
        return [own for own in self.process.children(recursive=True) if word in " ".join(_command_line(own))]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def chat_folder(folder: Path) -> Path:
    """The demo model with a chat template."""
    shutil.copytree(DEMO_MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@contextmanager
def served_with_gateway(folder: Path, *options: str, **variables: str) -> Iterator[Served]:
    port, gateway_port = free_ports(2)
    command = [COMMAND, "serve", str(folder), "--name", "demo", "--dtype", "float32", "--kv-cache-memory", "64MiB"]
    command += ["--device", "cpu", "--port", str(port), "--gateway-port", str(gateway_port), *options]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **variables}  # others want the cores too
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        assert [line.split(":")[0] for line in lines] == ["ready", "gateway"], lines
        direct = f"http://127.0.0.1:{port}/predictions/demo/1.0"
        yield Served(direct, f"http://127.0.0.1:{gateway_port}", process)
    finally:
        left = [process, *process.children(recursive=True)] if process.is_running() else []
        if process.is_running():
            process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()
        _, alive = psutil.wait_procs(left, timeout=20)
        for own in alive:
            own.kill()
    assert not alive
