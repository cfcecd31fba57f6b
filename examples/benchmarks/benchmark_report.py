"""The benchmark's figures summed up, and as Markdown. Knows neither processes nor models.

A result is the JSON that `benchmark.py` writes: `machine`, `work` (`roofline.Work`), `streams`, `rounds`, the
`roofline` of each round (`roofline.Machine`) and its `limit`, None where no round has one; `missing` and `failed`
systems with the reason; and `systems`: each one's `label`, `about`, `peak_mib` of its ranks, and its `rounds`: `first`,
and for each number of streams, as text, `rate`, `next` and `slow`. Times are seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from roofline import Work

Result = dict[str, Any]
REFERENCE = "engine-1"


def median_of(system: Result, key: str, streams: int | None = None) -> float | None:
    """The rounds' median of `first`, or of what is known for a number of streams; None where it is not."""
    values = [value for value in _values(system, key, streams) if value is not None]
    return statistics.median(values) if values else None


def _values(system: Result, key: str, streams: int | None) -> list[float | None]:
    """Of each round; one that failed was in fewer rounds, and not in all of its last one."""
    rows = system["rounds"]
    return [row.get(key) if streams is None else row["streams"].get(str(streams), {}).get(key) for row in rows]


def median_ratio(
    result: Result, name: str, key: str, streams: int | None = None, *, reference: str = REFERENCE
) -> float | None:
    """The median of each round's ratio to another system, of the rounds that have both; None where none has, and for
    the other system itself."""
    systems = result["systems"]
    if name not in systems or reference not in systems or name == reference:
        return None
    pairs = zip(*(_values(systems[each], key, streams) for each in (name, reference)), strict=False)
    ratios = [own / other for own, other in pairs if own is not None and other is not None]
    return statistics.median(ratios) if ratios else None


def markdown(result: Result) -> str:
    parts = [_head(result), _rates(result), _latencies(result), _pairs(result), _starts(result), _absent(result)]
    return "\n".join(part for part in parts if part)


def _head(result: Result) -> str:
    """Of which machine and dtype the figures are, and what it could do."""
    machine = result["machine"]
    sets = " ".join(machine["instruction_sets"]) or "no AVX2"
    by = {"native": "the package's kernels", "torch": "torch's own functions"}[machine["backend"]]
    return (
        f"{result['date']}, {machine['processor']}, {machine['num_cores']} cores, {sets}; {machine['dtype']}, in "
        f"ts_parallel by {by} ({machine['instruction_set']}: {machine['why']}); medians of rounds: {result['rounds']}. "
        f"{_roofline(result['roofline'])}\n"
    )


def _roofline(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "Roofline: not measured."
    bandwidth, flops = (statistics.median(row[key] for row in rows) for key in ("bandwidth", "flops"))
    best = " or ".join(sorted({row["product"] for row in rows}))
    names = rows[0]["products"]
    each = ", ".join(f"{name} {_giga(statistics.median(row['products'][name] for row in rows))}" for name in names)
    return f"Roofline: {_giga(bandwidth)} GB/s read, {_giga(flops)} GFLOP/s multiplied in {best} (of {each})."


def _giga(number: float) -> str:
    """In billions, two digits at least."""
    return f"{number / 1e9:.1f}" if number < 1e11 else f"{number / 1e9:.0f}"


def _rates(result: Result) -> str:
    streams, work = result["streams"], Work(**result["work"])
    kinds = "tokens/s | of limit | GB/s | GFLOP/s | ratio"
    columns = [f"{count} stream{'s' * (count > 1)}, {kinds}" for count in streams]
    rows = []
    for name, system in result["systems"].items():
        cells = [system["label"]]
        for count in streams:
            rate, limit = median_of(system, "rate", count), result["limit"][str(count)]
            if rate is None:
                cells += ["—"] * (kinds.count("|") + 1)
                continue
            read, multiplied = work.rates(rate, count, result["prompt_tokens"], result["output_tokens"])
            cells += [f"{rate:.0f}", "—" if limit is None else f"{rate / limit['rate']:.0%}"]
            cells += [_giga(read), _giga(multiplied), _number(median_ratio(result, name, "rate", count), 1, ".2f")]
        rows.append(cells)
    if result["roofline"]:
        most = [_giga(statistics.median(row[key] for row in result["roofline"])) for key in ("bandwidth", "flops")]
        limits = [f"{result['limit'][str(count)]['rate']:.0f} | 100% | {' | '.join(most)} | —" for count in streams]
        rows.append(["limit by the roofline", *limits])
    return _table(["system", *columns], rows)


def _latencies(result: Result) -> str:
    streams = result["streams"]
    columns = [f"between tokens at {count}, ms | 99 of 100 within | p99 / p50" for count in streams]
    rows = []
    for name, system in result["systems"].items():
        first, ratio = median_of(system, "first"), median_ratio(result, name, "first")
        cells = [system["label"], _number(first, 1e3, ".1f"), _number(ratio, 1, ".2f")]
        for count in streams:
            usual, slow = median_of(system, "next", count), median_of(system, "slow", count)
            spread = slow / usual if usual and slow else None
            cells += [_number(usual, 1e3, ".1f"), _number(slow, 1e3, ".1f"), _number(spread, 1, ".2f")]
        rows.append(cells)
    if result["roofline"]:
        limit = result["limit"]
        own = [f"{limit[str(count)]['next'] * 1e3:.1f} | — | —" for count in streams]
        rows.append(["limit by the roofline", f"{limit[str(streams[0])]['first'] * 1e3:.1f}", "—", *own])
    return _table(["system", "first token when idle, ms", "ratio", *columns], rows)


def _pairs(result: Result) -> str:
    """What TorchServe and HTTP cost, and what more ranks bring on the same cores."""
    sizes = [name.removeprefix("engine-") for name in result["systems"] if name.startswith("engine-")]
    pairs = [(f"served-{size}", f"engine-{size}") for size in sizes]
    pairs += [(f"{kind}-{size}", f"{kind}-1") for size in sizes if size != "1" for kind in ("engine", "served")]
    rows = []
    for name, other in pairs:
        if not {name, other} <= result["systems"].keys():
            continue
        cells = [result["systems"][each]["label"] for each in (name, other)]
        cells.append(_number(median_ratio(result, name, "first", reference=other), 1, ".2f"))
        for count in result["streams"]:
            cells.append(_number(median_ratio(result, name, "rate", count, reference=other), 1, ".2f"))
        rows.append(cells)
    columns = [f"tokens/s at {count}" for count in result["streams"]]
    return _table(["ratio of", "to", "first token when idle", *columns], rows) if rows else ""


def _starts(result: Result) -> str:
    rows = []
    for system in result["systems"].values():
        about = system["about"]
        peaks = ", ".join(f"{peak:.0f}" for peak in system.get("peak_mib", ())) or "—"
        same = "—" if system["same_tokens"] is None else f"{system['same_tokens']}"
        cells = [system["label"], about["version"], f"{about['ready_seconds']:.1f}"]
        rows.append([*cells, _number(about["load_seconds"], 1, ".2f"), peaks, same])
    columns = [
        "system",
        "version",
        "first token possible after, s",
        "weights read in, s",
        "peak memory of each rank, MiB",
    ]
    columns.append(f"tokens as transformers', of {result['output_tokens']}")
    traced = "; ".join(f"{size} rank(s): {seconds:.1f} s" for size, seconds in result["traced_seconds"].items())
    return _table(columns, rows) + (f"Traced once, before: {traced}.\n" if traced else "")


def _absent(result: Result) -> str:
    lines = [f"- {name}: not measured: {reason}" for name, reason in result["missing"].items()]
    lines += [f"- {name}: failed: {reason}" for name, reason in result["failed"].items()]
    return "".join(f"{line}\n" for line in lines)


def _number(value: float | None, factor: float, kind: str) -> str:
    return "—" if value is None else format(value * factor, kind)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = " | ".join(columns)
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
