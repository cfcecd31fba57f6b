"""`ts-parallel bench`: a streaming load on any OpenAI-compatible server, and how fast it answers."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ts_parallel.cli.client.computing import computing_line, find_computing
from ts_parallel.cli.client.dialect import Dialect, find_dialect
from ts_parallel.cli.client.measure import PERCENTILES, Record, follow, run_load, summarize
from ts_parallel.cli.client.remote import URL, APIKey, RetryFor, ServedModel, Timeout, base_url, find_model
from ts_parallel.cli.client.stream_client import Client, Patience
from ts_parallel.cli.client.workload import Ask, PromptMaker, equal_asks, read_trace, spread
from ts_parallel.errors import ConfigError

_CONCURRENCY = (1, 8, 32)
_REQUESTS_OF_A_RATE = 100
_PROMPT_TOKENS, _OUTPUT_TOKENS = 128, 64
_LATE = 0.05  # seconds after its arrival from which on a request was sent late enough to be said
_MOST_ERRORS_SHOWN = 5


@dataclass(frozen=True)
class Load:
    name: str
    limit: int  # requests at a time
    asks: list[Ask]


def bench(
    url: URL,
    concurrency: Annotated[
        str | None, typer.Option(metavar="N,…", help="Requests at a time, one load for each number; by default 1,8,32.")
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Requests a second that arrive at random (Poisson), however many run."),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(min=1, help="Requests of each load; by default 4 × concurrency, at least 16; 100 of a rate."),
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help=f"By default {_PROMPT_TOKENS}.")] = None,
    output_tokens: Annotated[int | None, typer.Option(min=1, help=f"By default {_OUTPUT_TOKENS}.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines of arrival_seconds, prompt_tokens or prompt, and output_tokens: the load itself."
        ),
    ] = None,
    vocabulary: Annotated[
        int, typer.Option(min=4, help="Prompts are random token ids below this, and of at least half of it.")
    ] = 2000,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Most requests at a time of a rate or a trace.")] = 256,
    seed: Annotated[
        int, typer.Option(help="Of prompts and arrivals; where a server caches prefixes, take another for each run.")
    ] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write everything to, in seconds.")] = None,
    model: ServedModel = None,
    api_key: APIKey = None,
    timeout: Timeout = 600.0,
    retry_for: RetryFor = 60.0,
) -> None:
    """Load a server with streamed completions and print its rates and times; exit with 1 where any request failed.

    TTFT runs from before connecting to the first token. ITL is the time between two pieces of an answer divided by the
    tokens that the second brings, counted once for each of them; GAP is that time itself. E2E ends with the answer.

    A tiny request finds out what the server accepts, and one of the first one's size warms it up; neither is counted.
    """
    prompts = PromptMaker(seed, vocabulary)
    shape = (prompt_tokens, output_tokens)
    loads = plan_loads(prompts, concurrency, request_rate, num_requests, shape, trace, max_concurrency, seed)
    if json_file is not None and (json_file.is_dir() or not os.access(json_file.absolute().parent, os.W_OK)):
        raise ConfigError(f"cannot write {json_file}: it is a folder, or its own is missing or not writable")
    retries: list[str] = []
    client = Client(base_url(url), api_key, timeout, Patience(retry_for, lambda error, _: retries.append(str(error))))
    name = model or find_model(client)
    computed_by = find_computing(client, name)
    dialect = find_dialect(client, name, Ask(0.0, prompts.make(4), 2))
    for ask in (ask for load in loads for ask in load.asks):
        dialect.body(ask)  # what cannot be asked is refused before the load, not in the middle of it
    for _ in client.complete(dialect.body(prompts.like(loads[0].asks[0]))):
        pass
    results = run_loads(client, dialect, loads)
    failed = report(client.url, dialect, computed_by, results, json_file, seed, retries)
    raise typer.Exit(130 if len(results) < len(loads) else 1 if failed else 0)


def plan_loads(
    prompts: PromptMaker,
    concurrency: str | None,
    request_rate: float | None,
    num_requests: int | None,
    shape: tuple[int | None, int | None],
    trace: Path | None,
    max_concurrency: int,
    seed: int,
) -> list[Load]:
    """The loads that the options ask for, with every request of each.

    Raises:
        ConfigError: options that exclude each other, or a trace that is wrong.
    """
    if trace is not None:
        if (concurrency, request_rate, num_requests, *shape) != (None,) * 5:
            raise ConfigError(
                "--trace brings requests, arrivals and lengths: leave out --concurrency, --request-rate, "
                "--num-requests, --prompt-tokens and --output-tokens"
            )
        return [Load(f"trace {trace.name}", max_concurrency, read_trace(trace, prompts))]
    make = partial(
        equal_asks,
        num_prompt_tokens=shape[0] or _PROMPT_TOKENS,
        num_output_tokens=shape[1] or _OUTPUT_TOKENS,
        prompts=prompts,
    )
    if request_rate is None:
        levels = _CONCURRENCY if concurrency is None else parse_concurrency(concurrency)
        return [Load(f"concurrency {level}", level, make(num_requests or max(16, 4 * level))) for level in levels]
    if concurrency is not None:
        raise ConfigError("--concurrency and --request-rate are two kinds of load: give one of them")
    asks = spread(make(num_requests or _REQUESTS_OF_A_RATE), request_rate, seed)
    return [Load(f"{request_rate:g} requests/s", max_concurrency, asks)]


def parse_concurrency(text: str) -> tuple[int, ...]:
    """`"1,8"` → `(1, 8)`.

    Raises:
        ConfigError: it is no list of numbers of at least 1.
    """
    try:
        levels = tuple(int(number) for number in text.split(","))
    except ValueError:
        levels = (0,)
    if min(levels) < 1:
        raise ConfigError(f"--concurrency {text!r} is no list of numbers of at least 1 such as 1,8,32")
    return levels


def run_loads(client: Client, dialect: Dialect, loads: list[Load]) -> list[tuple[Load, list[Record]]]:
    """One load after the other; those that had ended where Ctrl-C ends it."""

    def send(ask: Ask, origin: float) -> Record:
        return follow(ask, client.complete(dialect.body(ask)), origin)

    results: list[tuple[Load, list[Record]]] = []
    with suppress(KeyboardInterrupt):
        for load in loads:
            records = run_load(load.asks, load.limit, send)
            results.append((load, list(_with_progress(records, load))))
    return results


def _with_progress(records: Iterator[Record], load: Load) -> Iterator[Record]:
    yield from tqdm(records, load.name, len(load.asks), leave=False, disable=None)  # None: shown to terminals only


def report(
    url: str,
    dialect: Dialect,
    computed_by: Mapping[str, Any],
    results: list[tuple[Load, list[Record]]],
    json_file: Path | None,
    seed: int,
    retries: Sequence[str] = (),
) -> int:
    """Print the tables and the notes, write the file; returns how many requests failed."""
    summaries = [(load, summarize(records)) for load, records in results]
    console = Console()
    if summaries:
        head = f"{dialect.model}: {computing_line(computed_by)}"
        console.print(head, markup=False, highlight=False, soft_wrap=True)
        console.print(_rates(summaries))
        console.print(_latencies(summaries))
    again = [f"{count} times asked again, which TTFT counts: {why}" for why, count in Counter(retries).items()]
    for note in [*_notes(dialect, summaries), *again[:_MOST_ERRORS_SHOWN]]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        loads = [
            {"load": load.name, "limit": load.limit, **summary, "records": [record.as_dict() for record in records]}
            for (load, summary), (_, records) in zip(summaries, results, strict=True)
        ]
        whole = {
            "url": url,
            "model": dialect.model,
            "computed_by": dict(computed_by),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": seed,
            "asked_again": dict(Counter(retries)),
            "refused_extras": sorted(dialect.refused),
            "loads": loads,
        }
        try:
            json_file.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write {json_file}: {error.strerror}") from None
    return sum(summary["failed"] for _, summary in summaries)


def _rates(summaries: list[tuple[Load, dict[str, Any]]]) -> Table:
    table = Table("load", "requests", "failed", "seconds", "requests/s", "output tokens/s", box=box.SIMPLE)
    for load, summary in summaries:
        table.add_row(
            load.name,
            str(summary["requests"]),
            str(summary["failed"]),
            f"{summary['seconds']:.2f}",
            f"{summary['requests_per_second']:.2f}",
            f"{summary['output_tokens_per_second']:.1f}",
        )
    return table


def _latencies(summaries: list[tuple[Load, dict[str, Any]]]) -> Table:
    table = Table("load", "ms", *(f"p{percent}" for percent in PERCENTILES), "mean", "count", box=box.SIMPLE)
    for load, summary in summaries:
        for number, (metric, figures) in enumerate(summary["metrics"].items()):
            cells = [_milliseconds(figures[key]) for key in (*(f"p{percent}" for percent in PERCENTILES), "mean")]
            name = "" if number else load.name
            table.add_row(name, metric.removesuffix("_seconds").upper(), *cells, str(figures["count"]))
    return table


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.1f}"


def _notes(dialect: Dialect, summaries: list[tuple[Load, dict[str, Any]]]) -> Iterator[str]:
    """What a reader of the figures has to know beside them."""
    if dialect.refused:
        yield f"asked without what the server refuses: {', '.join(sorted(dialect.refused))}"
    for load, summary in summaries:
        if summary["tokens_are_estimated"]:
            yield f"{load.name}: the server does not count each piece's tokens: ITL takes them as equally many"
        if count := summary["shorter_than_asked"]:
            yield f"{load.name}: {count} answers were shorter than asked"
        if count := summary["cached_prompt_tokens"]:
            yield f"{load.name}: {count} of {summary['prompt_tokens']} prompt tokens came from a prefix cache"
        if (late := summary["latest_sending_seconds"] or 0) > _LATE:
            yield f"{load.name}: requests were sent up to {late:.2f} s after their arrival: raise --max-concurrency"
        errors = list(summary["errors"].items())
        for message, count in errors[:_MOST_ERRORS_SHOWN]:
            yield f"{load.name}: {count} failed: {message}"
        if len(errors) > _MOST_ERRORS_SHOWN:
            yield f"{load.name}: {sum(count for _, count in errors[_MOST_ERRORS_SHOWN:])} failed otherwise"
