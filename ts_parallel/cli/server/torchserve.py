"""One TorchServe process with a workspace of its own, started, watched and ended with all its children."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import psutil

from ts_parallel.config import API_KEY_VARIABLE, ARCHIVE_VERSION
from ts_parallel.errors import ConfigError, StartupError
from ts_parallel.machine import is_loopback
from ts_parallel.serving.torchserve import draining
from ts_parallel.serving.torchserve.worker import CANNOT_START

_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_END = 15
_LONGEST_SOCKET = ".ts.sock.65535"  # TorchServe's own name for one, and the port or number that it adds
_LONGEST_SOCKET_PATH = 107
# Between two looks for open requests. Two without any are the end: until the first each worker has told of its own,
# until the second TorchServe has passed on the last that they sent.
_SECONDS_OF_A_LOOK = 0.5
_LINES_OF_A_FAILURE = 20
_FIRST_PORT, _PORTS_TRIED = 10000, 100
_MOST_CLAIMS = 100  # of one process: the servers of the oldest have long started
_claims: deque[int] = deque()  # file descriptors
_CORES_A_THREAD = 8  # of those that pass bytes on
# 1900 years. TorchServe knows no key for ever; it takes dates up to 1,000,000,000 AD, many readers of its key_file.json
# those with four digits for the year.
_MINUTES_OF_A_KEY = 10**9
# Also what OpenAI's own client for pages sends. A star is any, but for the first, which it does not stand for.
_HEADERS_OF_PAGES = "Authorization, Content-Type, X-Request-Id, X-Stainless-Arch, X-Stainless-Lang, X-Stainless-OS, "
_HEADERS_OF_PAGES += "X-Stainless-Package-Version, X-Stainless-Retry-Count, X-Stainless-Runtime, "
_HEADERS_OF_PAGES += "X-Stainless-Runtime-Version, X-Stainless-Timeout, *"
_STARTED, _READY = "Torch worker started.", "ts_parallel is ready"
MAX_MESSAGE_SIZE = 64 << 20
"""Bytes of a body on its way in or out. TorchServe's own, 6553500, is less than the tokens of a text of a million
words. What bounds it from above are Java's int, Java's heap, which is a quarter of the memory (the process grew by
130 MiB for an answer of 64 MiB), and those beside it: no other token passes meanwhile, which was 3 s for 64 MiB and 9 s
for 128 MiB on two cores."""


def find_java() -> str | None:
    """JAVA_HOME of the Java to use; None where `java` is on the path.

    Raises:
        StartupError: there is no Java.
    """
    home = os.environ.get("JAVA_HOME")
    if home and (Path(home) / "bin" / "java").is_file():
        return home
    if shutil.which("java"):
        return None
    raise StartupError(
        "TorchServe needs Java 11 or later and none was found: install one (Debian: apt-get install "
        "openjdk-17-jre-headless) or set JAVA_HOME"
    )


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    api_key: str | None = field(default=None, repr=False)
    """One or more that clients need, separated by commas. The handler asks for them, in place of TorchServe, which
    takes its own alone and refuses others in a shape of its own."""
    cors_origin: str | None = None
    """Whose pages may ask, as browsers name it; `*` for any."""


class TorchServe:
    """Owns one TorchServe and everything it starts. `workspace` holds its logs, sockets and unpacked archives."""

    def __init__(
        self,
        workspace: Path,
        store: Path,
        name: str,
        host: str,
        port: int,
        java_home: str | None,
        verbose: bool = False,
        metrics_port: int | None = None,
        max_request_size: int = MAX_MESSAGE_SIZE,
        max_response_size: int = MAX_MESSAGE_SIZE,
        access: Access | None = None,
    ) -> None:
        """
        Args:
            metrics_port: where on loopback Prometheus finds all metrics; None: they go to a log file.
            max_request_size: bytes of a body; TorchServe answers a larger one with 413.
            max_response_size: bytes of an answer that is no stream; a larger one becomes a 413.
        """
        self._workspace = workspace
        self._store = store
        self._name = name
        self._host = host
        self._port = port
        self._java_home = java_home
        self._verbose = verbose
        self._metrics_port = metrics_port
        self._max_request_size = max_request_size
        self._max_response_size = max_response_size
        self._access = access or Access()
        self._log = workspace / "torchserve.log"
        self._drain_folder = workspace / "drain"
        self._process: subprocess.Popen[bytes] | None = None
        self.grpc_port: int | None = None  # once it was started
        self.key_file = None if self._access.api_key or is_loopback(host) else workspace / "key_file.json"

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/predictions/{self._name}"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus finds the metrics, if it does."""
        return f"http://127.0.0.1:{self._metrics_port}/metrics"

    @property
    def log_folder(self) -> Path:
        return self._workspace / "logs"

    @property
    def pid(self) -> int | None:
        """Of the process that started TorchServe; None before that."""
        return None if self._process is None else self._process.pid

    def log_text(self) -> str:
        """All that TorchServe and its workers have printed so far."""
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        """
        Raises:
            ConfigError: the port is taken, or the workspace's path is too long for sockets.
        """
        with socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, self._port))
            except OSError as error:
                raise ConfigError(
                    f"cannot listen on {self._host}:{self._port}: {error.strerror}; choose another --port"
                ) from None
        socket_file = self._workspace / "tmp" / _LONGEST_SOCKET
        if len(os.fsencode(socket_file)) > _LONGEST_SOCKET_PATH:
            raise ConfigError(
                f"TorchServe's sockets in {socket_file.parent} would have longer paths than Linux takes "
                f"({_LONGEST_SOCKET_PATH} bytes): set TMPDIR to a folder with a shorter name"
            )
        properties = self._workspace / "config.properties"
        properties.write_text(self._properties())
        command = [
            sys.executable,
            "-c",
            "from ts.model_server import start; start()",
            "--start",
            "--foreground",
            "--ncs",
        ]
        command += ["--model-store", str(self._store), "--models", f"{self._name}={self._name}.mar"]
        command += ["--ts-config", str(properties), "--log-config", str(Path(__file__).with_name("log4j2.xml"))]
        if self.key_file is None:
            command.append("--disable-token-auth")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._workspace,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self, stop: threading.Event, on_line: Callable[[str], None] = lambda _: None) -> None:
        """Return once the model answers, or once `stop` is set; `on_line` is told each line of the log.

        Raises:
            StartupError: TorchServe ended, or its worker said that it cannot start.
        """
        seen = 0
        while not stop.wait(_SECONDS_BETWEEN_LOOKS):
            text = self.log_text()
            lines = text[: text.rfind("\n") + 1].splitlines()  # what is half written comes whole next time
            for line in lines[seen:]:
                if self._verbose:
                    print(line, file=sys.stderr)
                on_line(line)
                _follow_worker([line], is_starting=True)
            seen = len(lines)
            assert self._process is not None
            if self._process.poll() is not None:
                raise StartupError(
                    "TorchServe ended: " + "\n".join(self.log_text().splitlines()[-_LINES_OF_A_FAILURE:])
                )
            if any(_READY in line for line in lines) and self._answers():
                return

    def wait(self, stop: threading.Event, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return once `stop` is set; `meanwhile` is called again and again, and may raise.

        Raises:
            StartupError: TorchServe ended by itself, or a worker that it started anew says that it cannot start. It
                would try that for ever, and its clients would wait.
        """
        assert self._process is not None
        with self._log.open(errors="replace") as log:
            log.seek(0, os.SEEK_END)
            line, is_starting = "", False
            while not stop.wait(_SECONDS_BETWEEN_LOOKS):
                if self._process.poll() is not None:
                    raise StartupError(f"TorchServe ended with status {self._process.returncode}")
                *lines, line = (line + log.read()).split("\n")
                is_starting = _follow_worker(lines, is_starting)
                meanwhile()

    def drain(self, seconds: float, at_once: threading.Event, tell: Callable[[int], None]) -> int:
        """Take no more requests, and return once all that are open have ended, `seconds` have passed, or `at_once` is
        set.

        Args:
            tell: called with how many are open, where they are waited for.

        Returns: how many are open still.
        """
        assert self._process is not None
        draining.begin(self._drain_folder)
        deadline = time.monotonic() + seconds
        count, num_empty, has_told = 0, 0, False
        while num_empty < 2 and time.monotonic() < deadline and self._process.poll() is None:
            if at_once.wait(_SECONDS_OF_A_LOOK):
                break
            count = draining.num_open(self._drain_folder)
            num_empty = 0 if count else num_empty + 1
            if count and not has_told:
                tell(count)
                has_told = True
        return count

    def stop(self) -> None:
        """End TorchServe, its workers and their ranks; kill what does not end by itself."""
        if self._process is None:
            return
        family = [*_family(self._process.pid), *self._strays()]
        for process in family:
            _signal(process, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=_SECONDS_TO_END)
        for process in alive:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=_SECONDS_TO_END)
        self._process.wait()

    def _strays(self) -> list[psutil.Process]:
        """What it has started and that has lost its parents."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.ppid() == 1 and process.environ().get("LOG_LOCATION") == str(self.log_folder):
                    found.append(process)
        return found

    def _answers(self) -> bool:
        request = urllib.request.Request(f"{self.url}/{ARCHIVE_VERSION}/health")
        if self.key_file is not None:
            keys = json.loads(self.key_file.read_text())
            request.add_header("Authorization", f"Bearer {keys['inference']['key']}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _properties(self) -> str:
        management, metrics, self.grpc_port, grpc_management, ranks = free_ports(5)
        host = f"[{self._host}]" if ":" in self._host else self._host
        settings = {
            "inference_address": f"http://{host}:{self._port}",
            "management_address": f"http://127.0.0.1:{management}",
            "metrics_address": f"http://127.0.0.1:{self._metrics_port or metrics}",
            "metrics_mode": "prometheus" if self._metrics_port else "log",
            "model_metrics_auto_detect": "true",  # else it knows only those of its own metrics.yaml, and drops ours
            "token_expiration_min": _MINUTES_OF_A_KEY,  # its own 60 would lock every client out after an hour
            "grpc_inference_port": self.grpc_port,
            "grpc_management_port": grpc_management,
            "initial_distribution_port": ranks,
            "job_queue_size": 1000,
            "max_request_size": self._max_request_size,
            "max_response_size": self._max_response_size,
            # Its own default, two a core, has a few bytes each to write, and each wakes for them.
            "number_of_netty_threads": max(1, (os.cpu_count() or 1) // _CORES_A_THREAD),
            "netty_client_threads": max(1, (os.cpu_count() or 1) // _CORES_A_THREAD),
            # It passes pieces on: to compile that again and better takes a core from the model for minutes.
            "vmargs": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        }
        if self._access.cors_origin is not None:
            settings |= {
                "cors_allowed_origin": self._access.cors_origin,
                "cors_allowed_methods": "GET, POST, OPTIONS",
                "cors_allowed_headers": _HEADERS_OF_PAGES,
            }
        return "".join(f"{key}={value}\n" for key, value in settings.items())

    def _environment(self) -> dict[str, str]:
        """TorchServe finds torchrun and python by PATH.

        All ranks are of this host, so torchrun meets itself in a file of its own, its ranks meet by a store of ours
        (`topology.py`), and gloo takes loopback: by torch's own choice each listens on all addresses of the host. The
        file grows by each sign of life, of which one a day is enough where nobody else looks.
        """
        own = self._workspace / "bin" / "torchrun"
        own.parent.mkdir()
        command = [sys.executable, "-P", str(Path(__file__).with_name("torchrun_once.py"))]
        own.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        own.chmod(0o755)
        scripts = os.pathsep.join([str(own.parent), str(Path(sys.executable).parent)])
        temporary = self._workspace / "tmp"
        temporary.mkdir()
        environment = {
            **os.environ,
            "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
            "TEMP": str(temporary),
            "TMPDIR": str(temporary),
            "LOG_LOCATION": str(self._workspace / "logs"),
            "METRICS_LOCATION": str(self._workspace / "logs"),
            "PET_RDZV_ENDPOINT": "",
            "PET_RDZV_CONF": "store_type=file,keep_alive_interval=86400",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            draining.VARIABLE: str(self._drain_folder),
        }
        environment.pop(API_KEY_VARIABLE, None)
        if self._access.api_key is not None:
            environment[API_KEY_VARIABLE] = self._access.api_key
        if self._java_home is not None:
            environment["JAVA_HOME"] = self._java_home
        else:
            environment.pop("JAVA_HOME", None)
        return environment


def _follow_worker(lines: Sequence[str], is_starting: bool) -> bool:
    """Whether a worker is starting, after these lines. Once it is ready, no line of its own is taken for a refusal:
    clients may have a hand in those.

    Raises:
        StartupError: one that is starting says that it cannot.
    """
    for line in lines:
        if _STARTED in line or _READY in line:
            is_starting = _STARTED in line
        elif is_starting and CANNOT_START in line:
            raise StartupError(line[line.index(CANNOT_START) + len(CANNOT_START) + 1 :])
    return is_starting


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on at this moment, that the kernel hands to nobody who asks for any port,
    and that no process which calls this is given again: until TorchServe has started, torchrun, clients and other
    servers look for some.

    Raises:
        StartupError: there are not so many.
    """
    with ExitStack() as held:
        chosen: list[int] = []
        for port in _ports_not_handed_out():
            probe = held.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                port = probe.getsockname()[1]
                _claim(port)
                chosen.append(port)
            if len(chosen) == count:
                return chosen
    raise StartupError(f"127.0.0.1 has no {count} free ports")


def _claim(port: int) -> None:
    """Keep it from the others who look, by a name that the kernel forgets with the process.

    Raises:
        OSError: another has it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
        claim.bind(f"\0ts_parallel port {port}")
        _claims.append(claim.detach())
    if len(_claims) > _MOST_CLAIMS:
        os.close(_claims.popleft())


def _ports_not_handed_out() -> Iterator[int]:
    """In an order of chance, so that two who look at the same time hardly meet; then a few of the kernel's choice."""
    handed_out = Path("/proc/sys/net/ipv4/ip_local_port_range")
    end = int(handed_out.read_text().split()[0]) if handed_out.exists() else _FIRST_PORT
    yield from random.sample(range(_FIRST_PORT, end), min(_PORTS_TRIED, max(end - _FIRST_PORT, 0)))
    yield from repeat(0, _PORTS_TRIED)


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def _signal(process: psutil.Process, kind: signal.Signals) -> None:
    try:
        process.send_signal(kind)
    except psutil.NoSuchProcess:
        pass
