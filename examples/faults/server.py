"""A real `ts-parallel serve` that is to be harmed: started, looked into, and looked for afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from getpass import getuser
from pathlib import Path
from uuid import uuid4

import psutil

from ts_parallel.cli.server.torchserve import free_ports

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
SECONDS_TO_STOP = 60
_SECONDS_TO_GO = 10
_MARK = "TS_PARALLEL_FAULT_TEST"  # in the environment of all that a server has started, wherever it has gone
_NO_TRACES = ("serve.log", f"torchinductor_{getuser()}")  # the latter is torch's own, kept for its next start
_JAVA, _AGENT = "org.pytorch.serve.ModelServer", "torchrun"


class Server:
    """Owns one `ts-parallel serve`, the temporary folder of all that it starts, and its mark in their environments."""

    def __init__(
        self,
        options: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        model: Path = DEMO_MODEL,
        before: Sequence[str] = (),
        first: str = "",
        place: Path | None = None,
    ) -> None:
        """
        Args:
            before: a command that runs the command line behind it, such as `unshare`.
            first: Python that runs before the command does.
            place: where its temporary folder is made.
        """
        code = f"{first}\nfrom ts_parallel.cli.main import main; main()"
        self._options = [*before, sys.executable, "-P", "-c", code, "serve"]
        self._options += [str(model), "--name", "demo", "--device", "cpu", "--dtype", "float32", *options]
        self._variables = dict(variables or {})
        self._mark = uuid4().hex
        self._shared_memory = set(os.listdir("/dev/shm"))
        self.model = model
        self.folder = Path(tempfile.mkdtemp(prefix="f-", dir=place))
        self.port = free_ports(1)[0]
        self.seconds_to_start = 0.0
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/predictions/demo"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Return once it says that it is ready.

        Raises:
            RuntimeError: it ended instead, or took too long.
        """
        began = time.monotonic()
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ, **self._variables}
        environment |= {"TMPDIR": str(self.folder), _MARK: self._mark}
        with (self.folder / "serve.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._options, "--port", str(self.port), "--drain-timeout", "0"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("ready"):
            why = (self.folder / "serve.log").read_text()[-3000:]
            self.stop()
            raise RuntimeError(f"it did not start: {why}")
        self.seconds_to_start = time.monotonic() - began

    def log_text(self) -> str:
        """All that TorchServe and its workers have printed."""
        return "".join(log.read_text(errors="replace") for log in self.folder.glob("tsp-*/torchserve.log"))

    def family(self) -> list[psutil.Process]:
        """All that it has started and is alive, also what has lost its parents."""
        own = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    own.append(process)
            except psutil.Error:
                continue
        return own

    def ranks(self) -> list[psutil.Process]:
        """Of all workers that are alive, in the order of their ranks."""
        found = [(number, process) for process in self.family() if (number := _rank_of(process)) is not None]
        return [process for _, process in sorted(found, key=lambda pair: (pair[0], pair[1].pid))]

    def rank(self, number: int) -> psutil.Process:
        """The newest process that is this rank."""
        return [process for process in self.ranks() if _rank_of(process) == number][-1]

    def agent(self) -> psutil.Process:
        """The torchrun that has started rank 0."""
        agent = self.rank(0).parent()
        assert agent is not None and _AGENT in " ".join(agent.cmdline())
        return agent

    def front_end(self) -> psutil.Process:
        return next(process for process in self.family() if _JAVA in " ".join(process.cmdline()))

    def strays(self) -> list[psutil.Process]:
        """What it has started and that is no more below it, and stays."""
        _, alive = psutil.wait_procs(self._not_below(), timeout=_SECONDS_TO_GO)
        return alive

    def _not_below(self) -> list[psutil.Process]:
        if self._process is None or not self.is_running:
            return self.family()
        below = {self._process.pid, *(own.pid for own in psutil.Process(self._process.pid).children(recursive=True))}
        return [process for process in self.family() if process.pid not in below]

    def stop(self) -> list[str]:
        """End it; what is left of it then: processes, files in its temporary folder, shared memory."""
        assert self._process is not None
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        left = [f"process {process.pid} ({process.name()})" for process in self.strays()]
        if self.folder.is_dir():
            left += [str(path) for path in self.folder.iterdir() if path.name not in _NO_TRACES]
        left += [f"/dev/shm/{name}" for name in sorted(set(os.listdir("/dev/shm")) - self._shared_memory)]
        for process in self.family():
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        return left


def _rank_of(process: psutil.Process) -> int | None:
    try:
        own = process.environ().get("RANK")
        is_worker = "model_service_worker.py" in " ".join(process.cmdline())
    except psutil.Error:
        return None
    return int(own) if own is not None and is_worker else None
