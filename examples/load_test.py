"""A steady mixed load on a real server for minutes: does anything grow, get slower, or stay behind?

    python examples/load_test.py --minutes 20 --json load.json --plot load.png

It serves a model with its gateway, as `ts-parallel serve` does, and keeps some clients asking: streams, whole answers,
chats, forms, counts of tokens, clients that leave, and bodies that are refused. Meanwhile it looks at every process of
the server. The exit status is 1 where a check fails:

- no request failed, and no stream had other tokens than the one before with the same prompt
- after the warm-up resident memory of every process stays within --memory-slack
- no process has more threads or open files at the end than after the warm-up
- 99 of 100 streams end as soon in the last minute as in the third, within --latency-slack
- all KV blocks are free at the end
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

import psutil

from ts_parallel.cli.client.stream_client import Client, RemoteError
from ts_parallel.cli.server.torchserve import free_ports

DEMO_MODEL = Path(__file__).parent / "demo_model"
PROMPTS = ("Return a new list containing", "def main(", "import os\n", "class Reader:\n    ", "x = [")
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_FREE = 20.0
_NUM_TOKENS = 32  # of a stream whose time is taken
_KINDS: Mapping[str, int] = {
    "stream": 6,
    "whole": 2,
    "chat": 2,
    "form": 1,
    "tokenize": 1,
    "refused": 1,
    "leaves": 1,
}
"""Of so many requests each."""


@dataclass(frozen=True)
class Look:
    """One process at one moment."""

    seconds: float
    memory: int
    """Resident bytes."""
    threads: int
    files: int


@dataclass
class Seen:
    """What has come of a load. Owns all figures; threads add to them."""

    begin: float = field(default_factory=time.monotonic)
    looks: dict[str, list[Look]] = field(default_factory=lambda: defaultdict(list))
    streams: list[tuple[float, float]] = field(default_factory=list)
    """When each ended, and how long it took."""
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    def now(self) -> float:
        return time.monotonic() - self.begin


@dataclass(frozen=True)
class Server:
    direct: str
    gateway: str
    process: psutil.Popen


def chatting(model: Path, folder: Path) -> Path:
    """The model, or a copy of it with a chat template where it has none."""
    if any(model.glob("chat_template*")) or "chat_template" in (model / "tokenizer_config.json").read_text():
        return model
    made = folder / model.name
    shutil.copytree(model, made)
    (made / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    return made


@contextmanager
def serving(model: Path, ranks: int) -> Iterator[Server]:
    """`ts-parallel serve`, with all that it starts; ended with it."""
    port, gateway_port = free_ports(2)
    command = [str(Path(sys.executable).parent / "ts-parallel"), "serve", str(model), "--name", "demo"]
    command += ["--tensor-parallel-size", str(ranks), "--dtype", "float32", "--kv-cache-memory", "64MiB"]
    command += ["--device", "cpu", "--port", str(port), "--gateway-port", str(gateway_port)]
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for word in ("ready", "gateway"):
            line = process.stdout.readline()
            if not line.startswith(word):
                raise SystemExit(f"the server did not start: {line!r}")
        yield Server(f"http://127.0.0.1:{port}/predictions/demo/1.0", f"http://127.0.0.1:{gateway_port}", process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


def name_of(process: psutil.Process) -> str:
    """What a process of a server is to its user; empty where it is of no interest, or gone."""
    try:
        words, variables = process.cmdline(), process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return ""
    line = " ".join(words)
    if "org.pytorch.serve" in line or "model-server.jar" in line:
        return "TorchServe"
    if "torchrun" in line or "torch.distributed.run" in line:
        return "torchrun"
    if "model_service_worker" in line:
        return f"rank {variables.get('RANK', '0')}"
    if "gateway" in words:
        return "gateway"
    return "serve" if "serve" in words else ""


def look(server: Server, seen: Seen) -> None:
    for process in (server.process, *server.process.children(recursive=True)):
        name = name_of(process)
        try:
            if name:
                own = Look(seen.now(), process.memory_info().rss, process.num_threads(), process.num_fds())
                seen.looks[name].append(own)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


class Asker:
    """One client after the other, each of a kind."""

    def __init__(self, server: Server, seen: Seen, number: int) -> None:
        self._server = server
        self._seen = seen
        self._chance = random.Random(number)
        self._clients = [Client(f"{base}/v1", timeout=120) for base in (server.direct, server.gateway)]
        self._ways: Mapping[str, Callable[[], None]] = {
            "stream": self._stream,
            "whole": lambda: self._post("/v1/completions", {"prompt": "x", "max_tokens": 8, "n": 2, "temperature": 1}),
            "chat": lambda: self._post("/v1/responses", {"input": "What is a list?", "max_output_tokens": 16}),
            "form": lambda: self._post("/v1/completions", {"prompt": "x", "guided_choice": ["yes", "no"]}),
            "tokenize": lambda: self._post("/tokenize", {"prompt": "a b c " * self._chance.randrange(1, 500)}),
            "refused": lambda: self._post("/v1/completions", {"prompt": "x", "max_tokens": -7}, status=400),
            "leaves": self._leave,
        }

    def ask_until(self, end: threading.Event) -> None:
        names, weights = list(_KINDS), list(_KINDS.values())
        while not end.is_set():
            (kind,) = self._chance.choices(names, weights)
            try:
                self._ways[kind]()
                self._seen.kinds[kind] += 1
            except (RemoteError, OSError, http.client.HTTPException, AssertionError) as error:
                self._seen.failures.append(f"{self._seen.now():.1f} s: {kind}: {error}")
                end.wait(0.5)

    def _stream(self) -> None:
        """Greedy, so that the same prompt has the same answer, whoever asks beside."""
        prompt = self._chance.choice(PROMPTS)
        body = {"model": "demo", "prompt": prompt, "max_tokens": _NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        begin = time.monotonic()
        text = "".join(piece.text for piece in self._chance.choice(self._clients).complete(body))
        self._seen.streams.append((self._seen.now(), time.monotonic() - begin))
        known = self._seen.texts.setdefault(prompt, text)
        assert text == known, f"{prompt!r} went on with {text!r}, and before with {known!r}"

    def _leave(self) -> None:
        body = {"model": "demo", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
        with closing(self._chance.choice(self._clients).complete(body)) as pieces:
            next(pieces)

    def _post(self, route: str, body: Mapping[str, Any], status: int = 200) -> None:
        base = urlsplit(self._server.gateway)
        connection = http.client.HTTPConnection(base.hostname or "", base.port, timeout=120)
        with closing(connection):
            connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
            assert response.status == status, f"{response.status}: {text[:200]}"


def load(server: Server, minutes: float, clients: int) -> Seen:
    """Ask for so long, and look at all processes meanwhile."""
    seen, end = Seen(), threading.Event()
    threads = [
        threading.Thread(target=Asker(server, seen, number).ask_until, args=(end,), daemon=True)
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        while seen.now() < minutes * 60:
            look(server, seen)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        end.set()
        for thread in threads:
            thread.join(150)
    return seen


def blocks_in_use(server: Server) -> float:
    """The part of the KV blocks that requests hold, once all have ended, or after some time."""
    address, used = urlsplit(server.direct), 1.0
    deadline = time.monotonic() + _SECONDS_TO_FREE
    while used and time.monotonic() < deadline:
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        with closing(connection):
            connection.request("GET", f"{address.path}/metrics")
            text = connection.getresponse().read().decode()
        found = re.search(r"^vllm:kv_cache_usage_perc\S* (\S+)$", text, re.MULTILINE)
        used = float(found[1]) if found else 1.0
        time.sleep(0.2)
    return used


def max_of(looks: Sequence[Look], what: str) -> int:
    return max(int(getattr(own, what)) for own in looks)


def p99(values: Sequence[float]) -> float | None:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else None


def judge(seen: Seen, in_use: float, minutes: float, memory_slack: float, latency_slack: float) -> dict[str, Any]:
    """All figures, and of each check whether it holds. A window is a minute, or a sixth of a run that is short."""
    window = min(60.0, minutes * 10)
    warm, last = (2 * window, 3 * window), (minutes * 60 - window, float("inf"))
    processes: dict[str, dict[str, Any]] = {}
    checks = {"no request failed": not seen.failures, "all KV blocks are free": in_use == 0}
    for name, looks in seen.looks.items():
        after, end = ([own for own in looks if low <= own.seconds < high] for low, high in (warm, last))
        if not after or not end:
            checks[f"{name} was there throughout"] = False
            continue
        growth = median(own.memory for own in end) / median(own.memory for own in after) - 1
        processes[name] = {
            "memory_bytes": median(own.memory for own in end),
            "memory_growth": round(growth, 4),
        }
        checks[f"memory of {name} is flat"] = growth <= memory_slack
        for what in ("threads", "files"):
            at_first, at_last = max_of(after, what), max_of(end, what)
            processes[name][what] = [at_first, at_last]
            checks[f"{name} has no more {what}"] = at_last <= at_first
    times = [[took for when, took in seen.streams if low <= when < high] for low, high in (warm, last)]
    third, final = map(p99, times)
    checks["99 of 100 streams end as soon as before"] = (
        third is not None and final is not None and final <= third * (1 + latency_slack)
    )
    return {
        "minutes": minutes,
        "window_seconds": window,
        "requests": dict(seen.kinds),
        "failures": seen.failures,
        "blocks_in_use_at_the_end": in_use,
        "p99_seconds": {"third_window": third, "last_window": final},
        "processes": processes,
        "checks": checks,
        "streams": [[round(when, 2), round(took, 4)] for when, took in seen.streams],
        "looks": {
            name: [[round(own.seconds, 1), own.memory, own.threads, own.files] for own in looks]
            for name, looks in seen.looks.items()
        },
    }


def draw(figures: Mapping[str, Any], file: Path) -> None:
    """Memory of each process beside its own after the warm-up, open files, and how long streams took, as PNG."""
    import matplotlib  # type: ignore[import-not-found, unused-ignore]

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = figures["window_seconds"]
    figure, (memory, files, times) = pyplot.subplots(3, 1, figsize=(10, 10), layout="constrained", sharex=True)
    for name, looks in figures["looks"].items():
        moments = [own[0] / 60 for own in looks]
        base = median([own[1] for own in looks if own[0] >= 2 * window] or [looks[-1][1]])
        memory.plot(moments, [own[1] / base for own in looks], label=f"{name} ({base / 2**20:.0f} MiB)")
        files.plot(moments, [own[2] + own[3] for own in looks], label=name)
    times.plot([when / 60 for when, _ in figures["streams"]], [own for _, own in figures["streams"]], ",")
    memory.set(ylabel="resident memory / its median", ylim=(0.8, 1.1))
    files.set(ylabel="threads and open files")
    times.set(ylabel=f"seconds of a stream of {_NUM_TOKENS} tokens", xlabel="minutes", ylim=(0, None))
    for axes in (memory, files, times):
        axes.grid(alpha=0.3)
    memory.legend(fontsize="small", loc="lower right")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def report(figures: Mapping[str, Any]) -> Iterator[str]:
    yield f"{figures['minutes']:g} minutes, requests: {figures['requests']}, {len(figures['failures'])} failed"
    yield from figures["failures"][:10]
    for name, own in figures["processes"].items():
        yield (
            f"{name:10} {own['memory_bytes'] / 2**20:7.0f} MiB ({own['memory_growth']:+.1%}), "
            f"threads {own['threads']}, files {own['files']}"
        )
    third, last = figures["p99_seconds"].values()
    yield f"99 of 100 streams within {third} s in the third window, {last} s in the last"
    yield from (f"{'ok  ' if holds else 'FAIL'} {check}" for check, holds in figures["checks"].items() if not holds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=6, help="that ask at once")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--ranks", type=int, default=2, help="of tensor parallelism")
    parser.add_argument("--memory-slack", type=float, default=0.03)
    parser.add_argument("--latency-slack", type=float, default=0.10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="needs matplotlib")
    own = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, serving(chatting(own.model, Path(folder)), own.ranks) as server:
        seen = load(server, own.minutes, own.clients)
        in_use = blocks_in_use(server)
    figures = judge(seen, in_use, own.minutes, own.memory_slack, own.latency_slack)
    print(*report(figures), sep="\n")
    if own.json is not None:
        own.json.write_text(json.dumps(figures) + "\n")
    if own.plot is not None:
        draw(figures, own.plot)
    return 0 if all(figures["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
