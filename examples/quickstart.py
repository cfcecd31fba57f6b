"""Package a model with torch-model-archiver, start TorchServe on it in tensor-parallel ranks, stream one answer.

./examples/quickstart                      the demo model in this folder, until Ctrl-C
./examples/quickstart --once               … until the answer has ended
./examples/quickstart --model PATH_OR_ID   a model of yours, from a folder or the hub
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from ts_parallel.checkpoint.source import locate_checkpoint
from ts_parallel.cli.server.archive import default_name, handler_config
from ts_parallel.cli.server.serve import running, stopped_by_signals
from ts_parallel.cli.server.startup import shown_startup
from ts_parallel.cli.server.torchserve import free_ports
from ts_parallel.errors import TSParallelError

DEMO_MODEL = Path(__file__).parent / "demo_model"


def stream(url: str, prompt: str, max_tokens: int) -> None:
    """Print an answer as it comes."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=300)
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens})
    connection.request("POST", address.path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    print(prompt, end="", flush=True)
    while piece := response.read1():
        print(piece.decode("utf-8", errors="replace"), end="", flush=True)
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), metavar="PATH_OR_HUB_ID")
    parser.add_argument("--tensor-parallel-size", type=int, default=2, metavar="N")
    parser.add_argument("--prompt", default="Return a new list containing")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    arguments = parser.parse_args()

    folder = locate_checkpoint(arguments.model)
    name = "demo" if folder == DEMO_MODEL.resolve() else default_name(folder)
    config = handler_config(folder, tensor_parallel_size=arguments.tensor_parallel_size)
    port = arguments.port or free_ports(1)[0]
    print(f"starting TorchServe with {arguments.tensor_parallel_size} tensor-parallel ranks", flush=True)
    started = time.perf_counter()
    with (
        stopped_by_signals() as stop,
        running(config, folder, name, "127.0.0.1", port, False, stop, show=shown_startup) as server,
    ):
        if stop.is_set():
            return
        print(f"ready after {time.perf_counter() - started:.1f} s: {server.url}\n", flush=True)
        stream(server.url, arguments.prompt, arguments.max_tokens)
        body = json.dumps({"prompt": arguments.prompt, "max_tokens": arguments.max_tokens})
        print("\nThe same by hand:")
        print(f"  curl -N {server.url} -H 'Content-Type: application/json' -d '{body}'\n", flush=True)
        if not arguments.once:
            print("Ctrl-C stops the server.", flush=True)
            server.wait(stop)


if __name__ == "__main__":
    try:
        main()
    except TSParallelError as error:
        sys.exit(f"quickstart: {error}")
