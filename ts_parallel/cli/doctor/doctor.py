"""`ts-parallel doctor`: whether this machine can serve, a line for each thing that matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import typer

from ts_parallel.cli.doctor import computing, host, software
from ts_parallel.cli.doctor.arithmetic import Arithmetic, in_own_process
from ts_parallel.cli.doctor.finding import Check, Status, finding_of
from ts_parallel.cli.doctor.loopback import Ranks, two_ranks
from ts_parallel.machine import core_quota, this_machine


def doctor() -> None:
    """Check that this machine can serve, and say what to do where not; exit with 1 where anything fails.

    It looks at versions, processor, kernels (beside a plain reference), Java, memory, folders, ports, and whether two
    processes can talk. It takes some seconds, needs no model and no network, and leaves nothing behind.
    """
    counts: Counter[Status] = Counter()
    with two_ranks() as ranks, in_own_process() as arithmetic:
        for name, check in checks(ranks, arithmetic):
            finding = finding_of(name, check)
            counts[finding.status] += 1
            print(finding.line, flush=True)
    print(", ".join(f"{counts[status]} {status}" for status in Status if counts[status]))
    raise typer.Exit(1 if counts[Status.FAIL] else 0)


def checks(ranks: Ranks, arithmetic: Arithmetic) -> Iterator[tuple[str, Check]]:
    yield "versions", software.versions
    yield "processor", partial(computing.processor, this_machine(), core_quota())
    yield "backend", computing.backend
    yield from arithmetic.checks()
    yield "Java", software.java
    yield "memory", host.memory
    yield "huge pages", host.huge_pages
    yield "shared memory", host.shared_memory
    yield "temporary folder", host.temporary_folder
    yield "trace cache", software.cache
    yield "ports", host.ports
    yield "ranks over gloo", ranks.finding
