"""Serve a 125M-parameter Llama with random weights through TorchServe and time it beside transformers' `generate`.

All do the same work: prompts of 128 random token ids, 64 tokens out, greedy, end marks ignored, bfloat16. They take
turns, round by round, in one run; the medians and their ratios are printed as a Markdown table. With one rank the same
engine runs in process too: what TorchServe and HTTP cost is the difference. The prefix cache is off, for the prompts of
all rounds are the same.
"""

from __future__ import annotations

import argparse
import http.client
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from ts_parallel.cli.archive import handler_config
from ts_parallel.cli.serve import running
from ts_parallel.cli.torchserve import free_ports
from ts_parallel.config import HandlerConfig

Rows = dict[int, dict[str, float]]
"""Number of streams → tokens/s (`rate`) and, where it is known, seconds to the first token (`first`)."""

PROMPT_TOKENS, OUTPUT_TOKENS, VOCABULARY = 128, 64, 16000
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
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    for _ in sys.stdin:
        result = {}
        for count in counts:
            ids = torch.tensor(make_prompts(count))
            mask = torch.ones_like(ids)
            started = time.perf_counter()
            model.generate(ids, attention_mask=mask, max_new_tokens=1, min_new_tokens=1, **options)
            first = time.perf_counter() - started
            started = time.perf_counter()
            model.generate(
                ids, attention_mask=mask, max_new_tokens=OUTPUT_TOKENS, min_new_tokens=OUTPUT_TOKENS, **options
            )
            result[count] = {"rate": count * OUTPUT_TOKENS / (time.perf_counter() - started), "first": first}
        print(json.dumps(result), flush=True)


def time_in_process(folder: Path, counts: list[int]) -> None:
    """The same for this package's engine without TorchServe."""
    from ts_parallel.engine.request import Request
    from ts_parallel.serving.text_generation import make_engine, make_runner
    from ts_parallel.topology import open_topology

    config = served_config(folder, 1)
    topology = open_topology(1, "cpu")
    engine = make_engine(make_runner(config, folder, topology), config)
    for _ in sys.stdin:
        result = {}
        for count in counts:
            requests = [
                Request(str(number), tuple(prompt), OUTPUT_TOKENS) for number, prompt in enumerate(make_prompts(count))
            ]
            started = time.perf_counter()
            engine.generate(requests)
            result[count] = {"rate": count * OUTPUT_TOKENS / (time.perf_counter() - started)}
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


def stream_one(url: str, prompt: list[int]) -> float:
    """Seconds to the first token of one streamed answer that is read to its end."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=600)
    body = {"prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    started = time.perf_counter()
    connection.request(
        "POST", f"{address.path}/1.0/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    first = response.read1()
    seconds = time.perf_counter() - started
    rest = first + response.read()
    connection.close()
    usage = [json.loads(line[6:])["usage"] for line in rest.split(b"\n") if b'"choices": []' in line]
    assert usage and usage[0]["completion_tokens"] == OUTPUT_TOKENS, rest[-300:]
    return seconds


def time_served(url: str, count: int) -> dict[str, float]:
    with ThreadPoolExecutor(count) as pool:
        started = time.perf_counter()
        firsts = list(pool.map(lambda prompt: stream_one(url, prompt), make_prompts(count)))
        return {"rate": count * OUTPUT_TOKENS / (time.perf_counter() - started), "first": statistics.median(firsts)}


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
            side()  # all warm up once
        rows = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
        ranks = sorted(set(re.findall(r"ts_parallel (rank \d+: .*)", server.log_text())))
    print(f"\n{date.today()}, {platform.machine()}, {rounds} rounds, medians\n")
    print(
        "| streams | over HTTP, tokens/s | engine in process | ratio | transformers generate | ratio "
        "| first token, ms | transformers' |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for count in streams:
        rate = {name: statistics.median(row[name][count]["rate"] for row in rows) for name in sides}
        first, their_first = (
            statistics.median(row[name][count]["first"] for row in rows) * 1e3 for name in ("served", "plain")
        )
        engine = f"{rate['engine']:.0f} | {rate['served'] / rate['engine']:.2f}" if "engine" in rate else "— | —"
        print(
            f"| {count} | {rate['served']:.0f} | {engine} | {rate['plain']:.0f} | {rate['served'] / rate['plain']:.2f} "
            f"| {first:.0f} | {their_first:.0f} |"
        )
    print(f"\nready {ready:.1f} s after the start; " + "; ".join(ranks))


if __name__ == "__main__":
    main()
