"""The benchmark's figures summed up, and as Markdown. Knows neither processes nor models.

A result is the JSON that `benchmark.py` writes: `machine`, `streams`, `rounds`, the `roofline` of each round and its
`limit`, `missing` and `failed` systems with the reason, and `systems`: each one's `label`, `about`, `peak_mib` of its
ranks, and its `rounds`: `first`, and for each number of streams, as text, `rate`, `next` and `slow`. Times are seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
REFERENCE = "engine-1"


def median_of(system: Result, key: str, streams: int | None = None) -> float | None:
    """The rounds' median of `first`, or of what is known for a number of streams; None where it is not."""
    rows = [row if streams is None else row["streams"][str(streams)] for row in system["rounds"]]
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def median_ratio(
    result: Result, name: str, key: str, streams: int | None = None, *, reference: str = REFERENCE
) -> float | None:
    """The median of each round's ratio to another system; None where one of them was not measured, or both are one."""
    systems = result["systems"]
    if name not in systems or reference not in systems or name == reference:
        return None

    def values(system: Result) -> list[float]:
        return [(row if streams is None else row["streams"][str(streams)])[key] for row in system["rounds"]]

    pairs = zip(values(systems[name]), values(systems[reference]), strict=True)
    return statistics.median(own / other for own, other in pairs)


def markdown(result: Result) -> str:
    parts = [_head(result), _rates(result), _latencies(result), _pairs(result), _starts(result), _absent(result)]
    return "\n".join(part for part in parts if part)


def _head(result: Result) -> str:
    machine, roofline = result["machine"], result["roofline"]
    bandwidth, flops = (statistics.median(row[key] for row in roofline) for key in ("bandwidth", "flops"))
    return (
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, medians of rounds: {result['rounds']}. "
        f"Roofline: {bandwidth / 1e9:.1f} GB/s read, {flops / 1e9:.0f} GFLOP/s in bfloat16.\n"
    )


def _rates(result: Result) -> str:
    streams = result["streams"]
    columns = [f"{count} stream{'s' * (count > 1)}, tokens/s | of limit | ratio" for count in streams]
    rows = []
    for name, system in result["systems"].items():
        cells = [system["label"]]
        for count in streams:
            rate = median_of(system, "rate", count)
            assert rate is not None
            limit = result["limit"][str(count)]["rate"]
            cells += [
                f"{rate:.0f}",
                f"{rate / limit:.0%}",
                _number(median_ratio(result, name, "rate", count), 1, ".2f"),
            ]
        rows.append(cells)
    limits = [f"{result['limit'][str(count)]['rate']:.0f} | 100% | —" for count in streams]
    return _table(["system", *columns], [*rows, ["limit by the roofline", *limits]])


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
    limit = result["limit"]
    own = [f"{limit[str(count)]['next'] * 1e3:.1f} | — | —" for count in streams]
    last = ["limit by the roofline", f"{limit[str(streams[0])]['first'] * 1e3:.1f}", "—", *own]
    return _table(["system", "first token when idle, ms", "ratio", *columns], [*rows, last])


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
        peaks = ", ".join(f"{peak:.0f}" for peak in system["peak_mib"]) or "—"
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


def cpu_name(read: Callable[[], str] = Path("/proc/cpuinfo").read_text) -> str:
    """As Linux calls it; `an unknown CPU` elsewhere."""
    try:
        lines = read().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "an unknown CPU")
