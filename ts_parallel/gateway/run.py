"""The process: a socket, a loop, and an end when it is told to."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ts_parallel.errors import ConfigError, RequestError
from ts_parallel.gateway.app import make_app
from ts_parallel.gateway.refusals import error_of
from ts_parallel.gateway.settings import GatewaySettings

_SECONDS_TO_END = 5
_MOST_WAITING = 2048  # connections that nobody has accepted yet


def run(settings: GatewaySettings, host: str, port: int) -> None:
    """Answer until Ctrl-C or SIGTERM. Answers that are open then have some seconds.

    Raises:
        ConfigError: the port is taken.
    """
    with listening(host, port) as listener:
        config = uvicorn.Config(
            make_app(settings),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            http=_Protocol,
            ws="none",
            timeout_graceful_shutdown=_SECONDS_TO_END,
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"ready: http://{shown}:{listener.getsockname()[1]}/v1", flush=True)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(_Server(config), listener))


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """
    Raises:
        ConfigError: nobody can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_MOST_WAITING)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from None
        yield listener


class _Protocol(HttpToolsProtocol):
    """Refuses what is no HTTP in the shape of all other refusals. What came before it on the connection is answered."""

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(error_of(RequestError("what came is no request of HTTP/1.1 that can be read")))
        head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        self.transport.close()


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it: uvicorn's own way ends the process by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(server: _Server, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    for kind in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(kind, _end, server)
    await server.serve(sockets=[listener])


def _end(server: _Server) -> None:
    """The first time the open answers may end; the second time they may not."""
    server.force_exit = server.should_exit
    server.should_exit = True
