"""How much the running requests notice while a long prompt is prefilled beside them, through TorchServe.

    python examples/benchmarks/parts/prefill.py      8 streams, and a prompt of 2,000 tokens in their midst

The model is that of `benchmark.py`: 125M parameters, bfloat16, random weights. Each round sends a long prompt.
The inter-token time is the worker's own, from its `metrics` route: the mean over all tokens that the streams got in the
two seconds before the long prompt, and from there to its first token. (Clients cannot tell: many tokens of this model
have no text, and bring no event.)
"""

from __future__ import annotations

import argparse
import platform
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from ts_parallel.cli.client.stream_client import Client, RemoteError
from ts_parallel.cli.server.archive import handler_config
from ts_parallel.cli.server.serve import running
from ts_parallel.cli.server.torchserve import free_ports

sys.path.insert(0, str(Path(__file__).parents[1]))  # where benchmark.py lies
from benchmark import make_model, make_prompts

SECONDS_TO_START, SECONDS_BEFORE = 6.0, 2.0
TOKENS_OF_A_STREAM = 3000


class LatencyMeter:
    """Reads the sum and number of all inter-token times so far."""

    def __init__(self, url: str) -> None:
        self._url = url

    def read(self) -> tuple[float, float]:
        """Seconds, tokens."""
        with urllib.request.urlopen(self._url, timeout=60) as response:
            lines = response.read().decode().splitlines()
        name = "vllm:inter_token_latency_seconds"
        seconds, tokens = (
            next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}_{part}{{"))
            for part in ("sum", "count")
        )
        return seconds, tokens


def mean_between(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Milliseconds."""
    return 1e3 * (after[0] - before[0]) / max(1, after[1] - before[1])


def hold_stream(client: Client, prompt: list[int], stop: threading.Event) -> None:
    """Read one long answer until `stop` is set, or its end."""
    body = {"model": "m", "prompt": prompt, "max_tokens": TOKENS_OF_A_STREAM, "temperature": 0, "ignore_eos": True}
    with suppress(RemoteError):  # the server ends before those streams that bring no more events
        for _ in client.complete(body):
            if stop.is_set():
                return


def one_round(client: Client, meter: LatencyMeter, prompt: list[int]) -> tuple[float, float, float]:
    """Seconds to the first token of a long prompt; milliseconds between tokens before and meanwhile."""
    marks = [meter.read()]
    time.sleep(SECONDS_BEFORE)
    marks.append(meter.read())
    started = time.perf_counter()
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    for _ in client.complete(body):
        pass
    seconds = time.perf_counter() - started
    marks.append(meter.read())
    return seconds, mean_between(marks[0], marks[1]), mean_between(marks[1], marks[2])


def measure(num_streams: int, num_prompt_tokens: int, num_rounds: int) -> list[tuple[float, float, float]]:
    with TemporaryDirectory(prefix="ts-parallel-benchmark-") as scratch:
        folder = Path(scratch) / "model"
        make_model(folder)
        config = handler_config(folder, "cpu", max_model_len=4096, kv_cache_memory="512MiB")
        with running(config, folder, "m", "127.0.0.1", free_ports(1)[0], False, threading.Event()) as server:
            client, stop = Client(f"{server.url}/1.0/v1"), threading.Event()
            for prompt in make_prompts(num_streams):
                threading.Thread(target=hold_stream, args=(client, prompt, stop), daemon=True).start()
            time.sleep(SECONDS_TO_START)
            rows = []
            for number in range(num_rounds):
                prompt = [10 + (number * 7919 + at * 31) % 15000 for at in range(num_prompt_tokens)]
                rows.append(one_round(client, LatencyMeter(f"{server.url}/1.0/metrics"), prompt))
            stop.set()
            time.sleep(1)  # so that most streams are left, and not broken off
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = measure(arguments.streams, arguments.prompt_tokens, arguments.rounds)
    print(
        f"{date.today()}, {platform.machine()}, {arguments.streams} streams, {arguments.prompt_tokens} prompt tokens\n"
    )
    print("| first token of the long prompt, s | inter-token time before, ms | meanwhile, ms | ratio |")
    print("|---|---|---|---|")
    for seconds, before, meanwhile in rows:
        print(f"| {seconds:.1f} | {before:.0f} | {meanwhile:.0f} | {meanwhile / before:.2f} |")


if __name__ == "__main__":
    main()
