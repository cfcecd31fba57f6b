"""This package, in process and served by TorchServe, beside its peers, all in one run on this machine.

    ./examples/benchmarks/benchmark                                      what this environment has
    ./examples/benchmarks/benchmark --peer llamacpp=/ENV/bin/python      … and a peer that has an environment of its own

The model is a 125M-parameter Llama with random weights in bfloat16, made here. All do the same work: prompts of 128
random token ids, 64 tokens out, greedy, end marks ignored, prefixes never shared. Systems that answer a batch as a
whole (transformers, llama.cpp) get batch after batch; in the others each stream asks again as soon as it is answered.
Each system is a process that has its model loaded; they take turns, at each number of streams, in another order each
round, and while one works nobody else does. Whoever is not installed, fails or takes too long is named as such.

Written are a Markdown page, which is printed too, all figures as JSON, and a plot where matplotlib is installed:

- output tokens/s: the median of the rounds, as a part of the roofline's limit (`roofline.py`), the GB/s of weights and
  the GFLOP/s that these are, and the median of each round's ratio to this package's engine in process on one rank;
- the time to the first token of one prompt while nothing else is asked: of the engine in process, that is its prefill
  alone, so the server's ratio to it tells what TorchServe and HTTP add;
- the time between two tokens of an answer, in the median and within which 99 of 100 are;
- the time from a process's start until it has made its first token, that for reading the weights, and the peak memory
  of each rank. The model was traced, and the GGUF file written, before.

How the peers' environments are made is in `peers/__init__.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmark_plot import draw
from benchmark_report import Result, markdown
from peers.process import PeerError, run_once
from peers.programs.engine import measured_config
from peers.rounds import OUTPUT_TOKENS, PROMPT_TOKENS, VOCABULARY, Task, make_prompts
from peers.sides import PEERS, Running, Side, find_peer, own_sides, peer_sides
from roofline import Machine, Work, work_of_llama

from ts_parallel.cli.server.serve import check
from ts_parallel.errors import TSParallelError
from ts_parallel.machine import this_machine
from ts_parallel.partition.prepared import CACHE_VARIABLE
from ts_parallel.runtime.backends.choose import describe_choice

__all__ = ["PROMPT_TOKENS", "make_model", "make_prompts"]  # what the other examples measure with

MODEL: Mapping[str, Any] = {
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
_FIRST_TOKENS_OF_A_ROUND = 5
_TOKENS_TO_WARM_UP = 16
_SECONDS_OF_THE_ROOFLINE = 60.0


def make_model(folder: Path, config: Mapping[str, Any] = MODEL) -> None:
    """The model and, since a server needs one, a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", "<pad>", *letters]
    words += [first + second for first in letters for second in letters][: VOCABULARY - len(words)]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


class Comparison:
    """Owns the systems that run, and what is known of them. One that fails is ended and named, with the figures that it
    had made by then, and the others go on."""

    def __init__(self, sides: list[Side], streams: list[int]) -> None:
        self.systems: dict[str, Result] = {}
        self.failed: dict[str, str] = {}
        self.roofline: list[dict[str, Any]] = []
        self._sides = {side.name: side for side in sides}
        self._streams = streams
        self._running: dict[str, tuple[Running, ExitStack]] = {}

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as all_of_them:
            for running in self._running.values():
                all_of_them.push(running[1])

    def start(self, folder: Path, scratch: Path) -> None:
        """One after the other, each once the one before is ready, and a short round of each to warm up."""
        for name, side in self._sides.items():
            tell(f"starting {side.label}")
            stack = ExitStack()
            try:
                system = stack.enter_context(side.running(folder, scratch))
                self._running[name] = system, stack
                for count in self._streams:
                    system.measure(Task(count, num_tokens=_TOKENS_TO_WARM_UP))
                answer = system.measure(Task(1)).get("token_ids")
                system.rest()
            except PeerError as error:
                self._fail(name, error)
                continue
            self.systems[name] = {"label": side.label, "about": system.about, "token_ids": answer, "rounds": []}

    def round(self, number: int) -> None:
        """Everything once. Who begins changes from round to round."""
        names = list(self._running)
        names = names[number % len(names) :] + names[: number % len(names)] if names else []
        for name in names:
            self.systems[name]["rounds"].append({"streams": {}})
        for name in names:
            self._attempt(name, self._first)
        for count in self._streams:
            for name in names:
                self._attempt(name, self._rate, count)

    def _attempt(self, name: str, measure: Any, *arguments: int) -> None:
        if name not in self._running:
            return
        try:
            measure(name, self.systems[name]["rounds"][-1], *arguments)
            self._running[name][0].rest()
        except PeerError as error:
            self._fail(name, error)

    def _first(self, name: str, row: dict[str, Any]) -> None:
        system, _ = self._running[name]
        taken = [system.measure(Task(1, num_tokens=1)) for _ in range(_FIRST_TOKENS_OF_A_ROUND)]
        row["first"] = statistics.median(each.get("first", each["seconds"]) for each in taken)

    def _rate(self, name: str, row: dict[str, Any], count: int) -> None:
        (system, _), side = self._running[name], self._sides[name]
        task = Task(count, side.asks_alone if count == 1 else side.asks)
        taken = system.measure(task)
        taken.pop("token_ids", None)
        rate = task.streams * task.asks * task.num_tokens / taken["seconds"]
        row["streams"][str(count)] = {"rate": rate, "asks": task.asks, **taken}
        tell(f"{count:3} streams {rate:7.1f} tokens/s  {side.label}")

    def _fail(self, name: str, error: PeerError) -> None:
        tell(f"{name} failed: {error}")
        self.failed[name] = str(error)
        if not any(row["streams"] for row in self.systems.get(name, {"rounds": []})["rounds"]):
            self.systems.pop(name, None)  # nothing is known of it
        if name in self._running:
            self._running.pop(name)[1].close()

    def look_at_machine(self) -> None:
        """What it could do at this moment (`roofline.Machine`). Where that fails, it is named, and all goes on."""
        if "roofline" in self.failed:
            return
        try:
            found: dict[str, Any] = json.loads(run_once([sys.executable, "-m", "roofline"], _SECONDS_OF_THE_ROOFLINE))
        except (PeerError, ValueError) as error:
            tell(f"roofline failed: {error}")
            self.failed["roofline"] = str(error)
            return
        self.roofline.append(found)

    def look_at_memory(self) -> None:
        for name, (system, _) in self._running.items():
            self.systems[name]["peak_mib"] = system.peaks()


def compare(sides: list[Side], folder: Path, scratch: Path, streams: list[int], rounds: int) -> Result:
    """Run everything on the model in `folder`; `benchmark_report` says what the result has."""
    with Comparison(sides, streams) as comparison:
        comparison.start(folder, scratch)
        for number in range(rounds):
            comparison.look_at_machine()
            comparison.round(number)
        comparison.look_at_memory()
    work, roofline = work_of_llama(json.loads((folder / "config.json").read_text())), comparison.roofline
    compare_tokens(comparison.systems)
    return {
        "date": str(date.today()),
        "machine": describe_machine(),
        "work": asdict(work),
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "streams": streams,
        "rounds": rounds,
        "roofline": roofline,
        "limit": limits(work, roofline, streams),
        "systems": comparison.systems,
        "failed": comparison.failed,
    }


def limits(work: Work, roofline: list[dict[str, Any]], streams: list[int]) -> dict[str, dict[str, float] | None]:
    """By the median of the rounds, for each number of streams as text; None where the machine was not measured."""
    if not roofline:
        return dict.fromkeys(map(str, streams))
    machine = Machine(*(statistics.median(row[key] for row in roofline) for key in ("bandwidth", "flops")))
    return {str(count): work.limit(machine, count, PROMPT_TOKENS, OUTPUT_TOKENS) for count in streams}


def describe_machine() -> dict[str, Any]:
    """Processor, cores and instruction sets, and by what this package computes the model's dtype on them."""
    import torch

    machine = this_machine()
    choice = describe_choice(torch.device("cpu"), torch.bfloat16)
    return {
        "processor": machine.processor,
        "num_cores": machine.num_cores,
        "instruction_sets": machine.instruction_sets,
        "dtype": "bfloat16",
        "backend": choice.backend,
        "instruction_set": choice.instruction_set,
        "why": choice.why,
    }


def compare_tokens(systems: dict[str, Result]) -> None:
    """How many tokens of each one's first answer are transformers' before the first that differs. Random weights have
    near ties, which rounding in bfloat16 decides; a system that computes another model agrees on none."""
    plain = systems["generate"]["token_ids"] if "generate" in systems else None
    for system in systems.values():
        own = system.pop("token_ids")
        if own is None or plain is None:
            system["same_tokens"] = None
            continue
        pairs = zip(own, plain, strict=True)
        system["same_tokens"] = next((index for index, (token, other) in enumerate(pairs) if token != other), len(own))


def choose_sides(sizes: list[int], peers: dict[str, str], asks: int) -> tuple[list[Side], dict[str, str]]:
    """This package's sides and those of all peers that are installed, and why the other peers are missing.

    Args:
        peers: name of a peer → the Python of its environment; others are looked for in this one.
    """
    sides, missing = [side for size in sizes for side in own_sides(size, asks)], {}
    for name in PEERS:
        try:
            sides += peer_sides(name, find_peer(name, peers.get(name)), sizes, asks)
        except PeerError as error:
            missing[name] = str(error)
    return sides, missing


def trace(folder: Path, sizes: list[int]) -> dict[str, float]:
    """Seconds that it takes, once for each shape, to trace the model; what is found is kept for all who start."""
    seconds = {}
    for size in sizes:
        started = time.perf_counter()
        try:
            check(measured_config(folder, size), folder)
        except TSParallelError as error:  # each of this package's systems will fail, and say so
            tell(f"{size} rank(s) cannot be traced: {error}")
            continue
        seconds[str(size)] = time.perf_counter() - started
    return seconds


def write(result: Result, folder: Path) -> None:
    page = markdown(result)
    print(f"\n{page}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.md").write_text(page)
    (folder / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install 'ts-parallel[benchmark]')")
    else:
        draw(result, folder / "benchmark.png")
    print(f"written to {folder}")


def end_on_sigterm() -> None:
    """Leave by the same way as Ctrl-C, so that all who were started are ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tensor-parallel-size", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"the Python of an environment that has a peer: {', '.join(PEERS)}",
    )
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="measure these alone, such as engine-1 llamacpp")
    parser.add_argument("--asks", type=int, default=2, help="how often each of several streams asks in a round")
    parser.add_argument("--output", type=Path, default=Path("build/benchmark"), help="folder of the results")
    chosen = parser.parse_args(arguments)
    for peer in chosen.peer:
        if peer.partition("=")[0] not in PEERS or not peer.partition("=")[2]:
            parser.error(f"--peer {peer}: give NAME=PYTHON, where NAME is one of {', '.join(PEERS)}")
    chosen.peer = dict(peer.split("=", 1) for peer in chosen.peer)
    return chosen


def main() -> int:
    arguments = parse_arguments()
    end_on_sigterm()
    sizes = arguments.tensor_parallel_size
    sides, missing = choose_sides(sizes, arguments.peer, arguments.asks)
    if arguments.systems:
        if unknown := set(arguments.systems) - {side.name for side in sides}:
            print(f"no system {', '.join(sorted(unknown))}; there are {', '.join(side.name for side in sides)}")
            return 2
        sides = [side for side in sides if side.name in arguments.systems]
    with TemporaryDirectory(prefix="ts-parallel-benchmark-") as scratch:
        folder = Path(scratch) / "model"
        os.environ[CACHE_VARIABLE] = str(Path(scratch) / "programs")
        tell("making the model")
        make_model(folder)
        traced = trace(folder, sizes)
        result = compare(sides, folder, Path(scratch), arguments.streams, arguments.rounds)
    write({**result, "missing": missing, "traced_seconds": traced}, arguments.output)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
