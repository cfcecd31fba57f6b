"""A request of its own that each replica keeps open, so that TorchServe's continuous batching can have replicas at all.

Under `continuousBatching` the workers of one model poll one queue under one lock, and a worker without requests keeps
the lock until a request comes: the streams of the other workers stand still meanwhile (`Model.pollInferJob` of
TorchServe 0.12.0). A worker that has a request never waits for one. So each replica sends one to its own front end, by
loopback, and whichever replica gets it leaves it unanswered for ever; one that has it already sends it back to be tried
again.
"""

from __future__ import annotations

import http.client
import json
import logging
import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from ts_parallel.serving.torchserve.front_end_settings import find_front_end, read_settings

logger = logging.getLogger(__name__)

ROUTE = "keep_open"
_SECONDS_BETWEEN_TRIES = 1.0
_DEFAULT_ADDRESS = "http://127.0.0.1:8080"


def has_replicas(settings: Mapping[str, Any]) -> bool:
    """Whether the front end of this model-config.yaml may start several workers that share a queue."""
    num_workers = max(int(settings.get(key, 1)) for key in ("minWorkers", "maxWorkers"))
    return num_workers > 1 and bool(settings.get("continuousBatching"))


def keep_one_open(name: str, version: str) -> None:
    """Send requests to the front end that started this process until it ends, one after the other, in a thread."""
    path = f"/predictions/{name}/{version}/{ROUTE}"
    threading.Thread(target=_run, args=(path,), name="keep open", daemon=True).start()


def _run(path: str) -> None:
    pause = threading.Event()
    while True:
        try:
            _send(path)
        except (OSError, ValueError, KeyError, http.client.HTTPException, psutil.Error) as error:
            logger.debug("the request that is kept open was broken off: %s", error)
        pause.wait(_SECONDS_BETWEEN_TRIES * random.uniform(0.5, 1.5))


def _send(path: str) -> None:
    """One request; returns once it is answered, which the replica that keeps it never does.

    Raises:
        OSError: the front end is not to be found, or ends.
    """
    front_end = find_front_end()
    if front_end is None:
        raise OSError("no Java process among this one's parents")
    address = urlsplit(_reachable(read_settings(front_end).get("inference_address", _DEFAULT_ADDRESS)))
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port or 80)
    try:
        connection.request("POST", path, "{}", _headers(front_end))
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            logger.warning("a replica cannot keep a request open: the front end answers %d", response.status)
    finally:
        connection.close()


def _reachable(address: str) -> str:
    """The same by loopback, where the front end listens on all of its machine's addresses."""
    return address.strip().replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")


def _headers(front_end: psutil.Process) -> dict[str, str]:
    """What the front end asks of its clients: its inference key, where it wrote one into its own folder."""
    key_file = Path(front_end.cwd()) / "key_file.json"
    headers = {"Content-Type": "application/json"}
    if key_file.is_file():
        headers["Authorization"] = f"Bearer {json.loads(key_file.read_text())['inference']['key']}"
    return headers
