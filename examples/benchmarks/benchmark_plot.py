"""Draw the benchmark's JSON, with matplotlib:

python examples/benchmarks/benchmark_plot.py benchmark.json benchmark.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmark_report import Result, median_of


def draw(result: Result, file: Path) -> None:
    """Tokens/s over streams with the roofline's limit, and what 99 of 100 tokens come within, as PNG."""
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rates, latencies) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    streams = result["streams"]
    if result["roofline"]:
        limit = [result["limit"][str(count)] for count in streams]
        rates.plot(streams, [row["rate"] for row in limit], "kx--", label="limit by the roofline")
        latencies.plot(streams, [row["next"] * 1e3 for row in limit], "kx--")
    for system in result["systems"].values():
        line = _plot(rates, streams, [median_of(system, "rate", count) for count in streams], system["label"], 1)
        color = line.get_color()
        _plot(latencies, streams, [median_of(system, "slow", count) for count in streams], system["label"], 1e3, color)
    rates.set(xlabel="streams", ylabel="output tokens/s", title="Output tokens/s")
    latencies.set(xlabel="streams", ylabel="ms", yscale="log", title="99 of 100 tokens follow within")
    for axes in (rates, latencies):
        axes.set_xscale("log", base=2)
        axes.set_xticks(streams, [str(count) for count in streams])
        axes.grid(alpha=0.3)
    rates.set_ylim(bottom=0)
    rates.legend(fontsize="small", loc="upper left")
    machine = result["machine"]
    about = f"{machine['processor']}, {machine['num_cores']} cores, {machine['instruction_set']}, {machine['dtype']}"
    figure.suptitle(f"{about}, {result['date']}", fontsize="small")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _plot(
    axes: Any, streams: list[int], values: list[float | None], label: str, factor: float, color: Any = None
) -> Any:
    """One system's line; where nothing is known there is no point."""
    numbers = [float("nan") if value is None else value * factor for value in values]
    return axes.plot(streams, numbers, marker="o", label=label, color=color)[0]


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
