"""How much the running requests notice while a long prompt is prefilled beside them, through TorchServe.

    python examples/prefill_benchmark.py      8 streams, and a prompt of 2,000 tokens in their midst

The model is that of `examples/benchmark.py`: 125M parameters, bfloat16, random weights. Each round sends a long prompt.
A stream's inter-token time is that between two of its pieces, divided by the tokens that the second one brings. Printed
are those of one second before the long prompt, and of the time from there to its first token.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import threading
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmark import make_model, make_prompts

from ts_parallel.cli.archive import handler_config
from ts_parallel.cli.serve import running
from ts_parallel.cli.stream_client import Client
from ts_parallel.cli.torchserve import free_ports

SECONDS_BEFORE, SECONDS_BETWEEN = 6.0, 2.0
TOKENS_OF_A_STREAM = 3000
USAGE = {"include_usage": True, "continuous_usage_stats": True}


class Stream:
    """One long answer, read in a thread. Owns when which of its tokens came."""

    def __init__(self, client: Client, prompt: list[int]) -> None:
        self.tokens: list[tuple[float, int]] = []  # moment, how many up to then
        self.is_wanted = True
        self._client = client
        self._prompt = prompt
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def latencies(self, start: float, end: float) -> list[float]:
        """The inter-token times, in seconds, of the tokens that came between two moments; one for each."""
        values: list[float] = []
        for (before, count), (moment, more) in zip(self.tokens, self.tokens[1:], strict=False):
            if start <= moment <= end and more > count:
                values += [(moment - before) / (more - count)] * (more - count)
        return values

    def _read(self) -> None:
        body = {
            "model": "m",
            "prompt": self._prompt,
            "max_tokens": TOKENS_OF_A_STREAM,
            "temperature": 0,
            "stream": True,
        }
        for piece in self._client.complete({**body, "ignore_eos": True, "stream_options": USAGE}):
            if piece.usage is not None:
                self.tokens.append((piece.moment, piece.usage.num_completion_tokens))
            if not self.is_wanted:
                return


def send_long(client: Client, prompt: list[int]) -> tuple[float, float]:
    """The moments between which a prompt was prefilled: it was sent, and its first token was there."""
    started = time.perf_counter()
    body = {"model": "m", "prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True, "ignore_eos": True}
    return started, next(iter(client.complete({**body, "stream_options": USAGE}))).moment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="ts-parallel-benchmark-") as scratch:
        folder = Path(scratch) / "model"
        make_model(folder)
        config = handler_config(folder, "cpu", max_model_len=4096, kv_cache_memory="512MiB")
        with running(config, folder, "m", "127.0.0.1", free_ports(1)[0], False, threading.Event()) as server:
            client = Client(f"{server.url}/1.0/v1")
            streams = [Stream(client, prompt) for prompt in make_prompts(arguments.streams)]
            time.sleep(SECONDS_BEFORE)
            rows = []
            for number in range(arguments.rounds):
                prompt = [10 + (number * 7919 + at * 31) % 15000 for at in range(arguments.prompt_tokens)]
                start, first = send_long(client, prompt)
                time.sleep(SECONDS_BETWEEN)
                before, during = (
                    [value for stream in streams for value in stream.latencies(*span)]
                    for span in ((start - SECONDS_BETWEEN / 2, start), (start, first))
                )
                rows.append((first - start, before, during))
            for stream in streams:
                stream.is_wanted = False
            for stream in streams:
                stream.thread.join(timeout=30)
    print(
        f"{date.today()}, {platform.machine()}, {arguments.streams} streams, {arguments.prompt_tokens} prompt tokens\n"
    )
    print(
        "| first token of the long prompt, s | inter-token time before, ms: median, p90 | during | ratio of medians |"
    )
    print("|---|---|---|---|")
    for seconds, before, during in rows:
        figures = [
            (statistics.median(part) * 1e3, statistics.quantiles(part, n=10)[8] * 1e3) for part in (before, during)
        ]
        (old, old_p90), (new, new_p90) = figures
        print(f"| {seconds:.1f} | {old:.0f}, {old_p90:.0f} | {new:.0f}, {new_p90:.0f} | {new / old:.2f} |")


if __name__ == "__main__":
    main()
