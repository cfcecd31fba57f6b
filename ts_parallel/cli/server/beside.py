"""The gateway that `serve --gateway-port` runs beside its TorchServe: started, kept up, and ended with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ts_parallel.cli.server.torchserve import Access, TorchServe
from ts_parallel.config import API_KEY_VARIABLE
from ts_parallel.errors import StartupError
from ts_parallel.gateway.run import listening

_SECONDS_TO_END = 10
_SECONDS_OF_A_GOOD_RUN = 30.0
_MOST_SHORT_RUNS = 3
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


class GatewayBeside:
    """Owns the gateway's process. One that ends is started again; one that cannot stay up ends the server."""

    def __init__(self, server: TorchServe, host: str, port: int, max_request_size: int, access: Access) -> None:
        """
        Args:
            access: who may ask the server, and so this.
        """
        code = "from ts_parallel.cli.main import main; main()"
        shown = f"[{host}]" if ":" in host else host
        upstream = server.url.replace(f"//{shown}:", f"//{_ANY_ADDRESS.get(host, shown)}:")
        self._command = [sys.executable, "-P", "-c", code, "gateway", "--host", host, "--port", str(port)]
        self._command += ["--upstream", upstream, "--max-request-size", str(max_request_size)]
        if access.cors_origin is not None:
            self._command += ["--cors-origin", access.cors_origin]
        self._environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
        if access.api_key is not None:  # one key opens both, and stands in no list of processes
            self._environment[API_KEY_VARIABLE] = access.api_key
        elif server.key_file is not None:
            self._command += ["--upstream-key-file", str(server.key_file)]
            self._environment[API_KEY_VARIABLE] = json.loads(server.key_file.read_text())["inference"]["key"]
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._num_short_runs = 0
        self.url = f"http://{shown}:{port}/v1"

    def start(self) -> None:
        """Return once it listens, or has ended."""
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which ends it
        )
        assert self._process.stdout is not None
        with self._process.stdout as output:
            output.readline()

    def keep_up(self) -> None:
        """Start it again where it has ended.

        Raises:
            StartupError: it ends again and again.
        """
        assert self._process is not None
        status = self._process.poll()
        if status is None:
            return
        is_short = time.monotonic() - self._started_at < _SECONDS_OF_A_GOOD_RUN
        self._num_short_runs = self._num_short_runs + 1 if is_short else 1
        if self._num_short_runs >= _MOST_SHORT_RUNS:
            raise StartupError(f"the gateway ended {self._num_short_runs} times in a row, with status {status}")
        print(f"the gateway ended with status {status} and is started again", file=sys.stderr, flush=True)
        self.start()

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def check_port(host: str, port: int) -> None:
    """
    Raises:
        ConfigError: nobody can listen there.
    """
    with listening(host, port):
        pass


@contextmanager
def gateway_beside(
    server: TorchServe, host: str, port: int, max_request_size: int, access: Access
) -> Iterator[GatewayBeside]:
    """A gateway before `server`, ended on leaving."""
    beside = GatewayBeside(server, host, port, max_request_size, access)
    try:
        beside.start()
        yield beside
    finally:
        beside.stop()
