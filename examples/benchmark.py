"""Serve a 125M-parameter Llama with random weights through TorchServe and time it beside transformers' `generate`.

All do the same work: prompts of 128 random token ids, 64 tokens out, greedy, end marks ignored, bfloat16. Each stream
asks three times, the next as soon as the last is answered; `generate` does it batch by batch. They take turns, round by
round, in one run; the medians and their ratios are printed as a Markdown table. With one rank the same engine runs in
process too: what TorchServe and HTTP cost is the difference. The server is loaded and read as `ts-parallel bench` does
it. The prefix cache is off, for the prompts of all rounds are the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ts_parallel.cli.archive import VERSION, handler_config
from ts_parallel.cli.dialect import Dialect
from ts_parallel.cli.measure import follow, run_load, summarize
from ts_parallel.cli.serve import running
from ts_parallel.cli.stream_client import Client
from ts_parallel.cli.torchserve import free_ports
from ts_parallel.cli.workload import Ask
from ts_parallel.config import HandlerConfig

Rows = dict[int, dict[str, float]]
"""Number of streams → tokens/s (`rate`), and where they are known seconds to the first token (`first`), and between two
(`next`, and `slow` for the slowest in a hundred)."""

PROMPT_TOKENS, OUTPUT_TOKENS, VOCABULARY = 128, 64, 16000
ASKS_OF_A_STREAM = 3
MODEL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def make_model(folder: Path) -> None:
    """The model and, since a server needs one, a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).to(torch.bfloat16).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", "<pad>", *letters]
    words += [first + second for first in letters for second in letters][: VOCABULARY - len(words)]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def make_prompts(count: int) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(10, VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def time_plainly(folder: Path, counts: list[int]) -> None:
    """A process of its own that runs one round of `generate` for each line it is sent; prints tokens/s as JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    for _ in sys.stdin:
        result = {}
        for count in counts:
            prompts = make_prompts(count * ASKS_OF_A_STREAM)
            batches = [torch.tensor(prompts[begin : begin + count]) for begin in range(0, len(prompts), count)]
            options["attention_mask"] = torch.ones_like(batches[0])
            started = time.perf_counter()
            model.generate(batches[0], max_new_tokens=1, min_new_tokens=1, **options)
            first = time.perf_counter() - started
            started = time.perf_counter()
            for ids in batches:
                model.generate(ids, max_new_tokens=OUTPUT_TOKENS, min_new_tokens=OUTPUT_TOKENS, **options)
            rate = len(prompts) * OUTPUT_TOKENS / (time.perf_counter() - started)
            result[count] = {"rate": rate, "first": first}
        print(json.dumps(result), flush=True)


def time_in_process(folder: Path, counts: list[int]) -> None:
    """The same for this package's engine without TorchServe."""
    from ts_parallel.engine.request import Request
    from ts_parallel.engine.scheduler import TokenOutput
    from ts_parallel.serving.text_generation import make_engine, make_runner
    from ts_parallel.topology import open_topology

    config = served_config(folder, 1)
    topology = open_topology(1, "cpu")
    engine = make_engine(make_runner(config, folder, topology), config)
    for _ in sys.stdin:
        result = {}
        for count in counts:
            prompts = make_prompts(count * ASKS_OF_A_STREAM)
            waiting = [Request(str(number), tuple(prompt), OUTPUT_TOKENS) for number, prompt in enumerate(prompts)]

            def ask_again(outputs: list[TokenOutput], waiting: list[Request] = waiting) -> None:
                for _ in range(min(len(waiting), sum(output.finish_reason is not None for output in outputs))):
                    engine.add(waiting.pop())

            started = time.perf_counter()
            for _ in range(count):
                engine.add(waiting.pop())
            while engine.has_requests:
                engine.step(deliver=ask_again)
            result[count] = {"rate": len(prompts) * OUTPUT_TOKENS / (time.perf_counter() - started)}
        print(json.dumps(result), flush=True)


def served_config(folder: Path, size: int) -> HandlerConfig:
    return handler_config(
        folder,
        "cpu",
        tensor_parallel_size=size,
        max_model_len=1024,
        kv_cache_memory="256MiB",
        enable_prefix_caching=False,
    )


def time_served(url: str, count: int) -> dict[str, float]:
    client, dialect = Client(f"{url}/{VERSION}/v1"), Dialect("m")
    asks = [Ask(0.0, tuple(prompt), OUTPUT_TOKENS) for prompt in make_prompts(count * ASKS_OF_A_STREAM)]
    records = run_load(asks, count, lambda ask, origin: follow(ask, client.complete(dialect.body(ask)), origin))
    summary = summarize(list(records))
    assert not summary["failed"] and not summary["shorter_than_asked"], summary["errors"]
    metrics = summary["metrics"]
    first, latency = metrics["ttft_seconds"]["p50"], metrics["itl_seconds"]
    return {
        "rate": summary["output_tokens_per_second"],
        "first": first,
        "next": latency["p50"],
        "slow": latency["p99"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--in-process", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        return time_plainly(arguments.plain, arguments.streams)
    if arguments.in_process:
        return time_in_process(arguments.in_process, arguments.streams)
    with TemporaryDirectory(prefix="ts-parallel-benchmark-") as scratch:
        folder = Path(scratch) / "model"
        make_model(folder)
        report(folder, arguments.streams, arguments.rounds, arguments.tensor_parallel_size)
    return None


class Beside:
    """A process that does one round for each line it is sent, and so takes turns with the server."""

    def __init__(self, kind: str, folder: Path, counts: list[int]) -> None:
        command = [sys.executable, __file__, kind, str(folder), "--streams", *map(str, counts)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def round(self) -> Rows:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return {int(count): row for count, row in json.loads(self._process.stdout.readline()).items()}


def report(folder: Path, streams: list[int], rounds: int, size: int) -> None:
    started = time.perf_counter()
    with ExitStack() as stack:
        config, port = served_config(folder, size), free_ports(1)[0]
        server = stack.enter_context(running(config, folder, "m", "127.0.0.1", port, False, threading.Event()))
        ready = time.perf_counter() - started
        sides = {"plain": stack.enter_context(Beside("--plain", folder, streams)).round}
        if size == 1:
            sides["engine"] = stack.enter_context(Beside("--in-process", folder, streams)).round
        sides["served"] = lambda: {count: time_served(server.url, count) for count in streams}
        for side in sides.values():
            side()  # all warm up
        rows = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
        ranks = sorted(set(re.findall(r"ts_parallel (rank \d+: .*)", server.log_text())))
    print(f"\n{date.today()}, {platform.machine()}, {rounds} rounds, medians\n")
    print(
        "| streams | over HTTP, tokens/s | engine in process | ratio | transformers generate | ratio "
        "| first token, ms | transformers' | between tokens, ms | 99 of 100 within |"
    )
    print("|---" * 10 + "|")
    for count in streams:
        rate = {name: statistics.median(row[name][count]["rate"] for row in rows) for name in sides}
        times = {
            key: statistics.median(row["served"][count][key] for row in rows) * 1e3 for key in ("first", "next", "slow")
        }
        their_first = statistics.median(row["plain"][count]["first"] for row in rows) * 1e3
        engine = f"{rate['engine']:.0f} | {rate['served'] / rate['engine']:.2f}" if "engine" in rate else "— | —"
        print(
            f"| {count} | {rate['served']:.0f} | {engine} | {rate['plain']:.0f} | {rate['served'] / rate['plain']:.2f} "
            f"| {times['first']:.0f} | {their_first:.0f} | {times['next']:.0f} | {times['slow']:.0f} |"
        )
    print(f"\nready {ready:.1f} s after the start; " + "; ".join(ranks))


if __name__ == "__main__":
    main()
