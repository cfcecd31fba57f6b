"""Who computes here, and whether rightly: the processor, the backend, its operations beside a plain reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ts_parallel.cli.doctor.finding import Finding, Status, judged
from ts_parallel.machine import Machine, this_machine
from ts_parallel.runtime.backends.choose import choose_backend, describe_choice, kernel_variants
from ts_parallel.runtime.backends.self_test import Operation, operations

_CPU = torch.device("cpu")
_BY = {"native": "the package's kernels", "torch": "torch's own functions"}


def processor(machine: Machine, quota: float | None) -> Finding:
    """
    Args:
        quota: how many cores' time this process gets; None: all of it.
    """
    text = f"{machine.processor}, {machine.num_cores} cores, {' '.join(machine.instruction_sets) or 'no AVX2'}"
    if quota is None or quota >= machine.num_cores:
        return Finding("processor", Status.OK, text)
    advice = (
        f"a quota gives them the time of {quota:g}, and stops who takes more; set num_threads to {max(1, int(quota))}"
    )
    return Finding("processor", Status.WARNING, text, advice)


def backend() -> Finding:
    """What is chosen for bfloat16 and for float32, and why."""
    chosen = {
        name: describe_choice(_CPU, dtype) for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    }
    text = "; ".join(f"{name} by {_BY[choice.backend]}, {choice.instruction_set}" for name, choice in chosen.items())
    if chosen["bfloat16"].backend == "torch":
        advice = f"no kernels, for {chosen['bfloat16'].why}; float32 is faster, and what dtype: auto means here"
    else:
        advice = ""
        text += f" ({chosen['bfloat16'].why}: {', '.join(kernel_variants())})"
    return judged("backend", text, advice, Status.WARNING)


def arithmetic() -> Iterator[tuple[str, Callable[[], Finding]]]:
    """A check of each operation of the backend that computes bfloat16, with a thread for every core."""
    chosen = choose_backend(_CPU, torch.bfloat16, this_machine().num_cores)
    for name, operation in operations(chosen).items():
        yield name, partial(_compared, name, chosen.name, operation)


def _compared(name: str, backend: str, operation: Operation) -> Finding:
    found = operation()
    numbers = f"{found.num_numbers:,} numbers"
    if found.num_wrong:
        text = f"{found.num_wrong:,} of {numbers} by {_BY[backend]} are off by more than {found.allowed}"
        meanwhile = "TS_PARALLEL_ISA=none" if backend == "native" else "dtype: float32"
        advice = f"answers would be wrong; report it with this page, and set {meanwhile} until then"
        return Finding(name, Status.FAIL, text, advice)
    text = f"{numbers} beside float64, off by at most {found.share:.2f} of {found.allowed}"
    return Finding(name, Status.OK, text if found.share else f"{numbers} beside float64, all the same")
