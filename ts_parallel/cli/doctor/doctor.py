"""`ts-parallel doctor`: whether this machine can serve, a line for each thing that matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import typer

from ts_parallel.cli.doctor import computing, host, software
from ts_parallel.cli.doctor.finding import Finding, Status
from ts_parallel.cli.doctor.loopback import Ranks, two_ranks
from ts_parallel.machine import core_quota, this_machine

Check = Callable[[], Finding]


def doctor() -> None:
    """Check that this machine can serve, and say what to do where not; exit with 1 where anything fails.

    It looks at versions, processor, kernels (beside a plain reference), Java, memory, folders, ports, and whether two
    processes can talk. It takes some seconds, needs no model and no network, and leaves nothing behind.
    """
    counts: Counter[Status] = Counter()
    with two_ranks() as ranks:
        for name, check in checks(ranks):
            finding = _run(name, check)
            counts[finding.status] += 1
            print(finding.line, flush=True)  # at once: what ends this process comes after the last line
    print(", ".join(f"{counts[status]} {status}" for status in Status if counts[status]))
    raise typer.Exit(1 if counts[Status.FAIL] else 0)


def checks(ranks: Ranks) -> Iterator[tuple[str, Check]]:
    yield "versions", software.versions
    yield "processor", partial(computing.processor, this_machine(), core_quota())
    yield "backend", computing.backend
    yield from computing.arithmetic()
    yield "Java", software.java
    yield "memory", host.memory
    yield "huge pages", host.huge_pages
    yield "shared memory", host.shared_memory
    yield "temporary folder", host.temporary_folder
    yield "trace cache", software.cache
    yield "ports", host.ports
    yield "ranks over gloo", ranks.finding


def _run(name: str, check: Check) -> Finding:
    """A check that breaks is a finding too, and the others follow."""
    try:
        return check()
    except Exception as error:
        text = f"the check ended by {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return Finding(name, Status.FAIL, text, "report it with this page")
