"""Who computes here, and whether rightly: the processor, the backend, its operations beside a plain reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from ts_parallel.cli.doctor.finding import Finding, Status, judged
from ts_parallel.machine import Machine, this_machine
from ts_parallel.runtime.backends.choose import choose_backend, describe_choice, kernel_variants
from ts_parallel.runtime.backends.self_test import Comparison, Operation, operations

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
    """What is chosen for each dtype, and why."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    chosen = {name: describe_choice(_CPU, dtype) for name, dtype in dtypes.items()}
    text = "; ".join(f"{name} by {_BY[choice.backend]}, {choice.instruction_set}" for name, choice in chosen.items())
    if chosen["bfloat16"].backend == "torch":
        advice = f"no kernels, for {chosen['bfloat16'].why}; float32 is faster, and what dtype: auto means here"
    else:
        advice = ""
        text += f" ({chosen['bfloat16'].why}: {', '.join(kernel_variants())})"
    return judged("backend", text, advice, Status.WARNING)


def arithmetic() -> Iterator[tuple[str, Callable[[], Finding]]]:
    """A check of each operation of the backend that computes bfloat16, and one of all operations in float16, with a
    thread for every core."""
    cores = this_machine().num_cores
    chosen = choose_backend(_CPU, torch.bfloat16, cores)
    for name, operation in operations(chosen).items():
        yield name, partial(_compared, name, chosen.name, operation)
    chosen = choose_backend(_CPU, torch.float16, cores)
    yield "float16", partial(_all_compared, chosen.name, operations(chosen, torch.float16))


def _compared(name: str, backend: str, operation: Operation) -> Finding:
    found = operation()
    if found.num_wrong:
        return _off(name, backend, f"{_wrong(found)} by {_BY[backend]} are off by more than {found.allowed}")
    numbers = f"{found.num_numbers:,} numbers beside float64"
    text = (
        f"{numbers}, off by at most {found.share:.2f} of {found.allowed}" if found.share else f"{numbers}, all the same"
    )
    return Finding(name, Status.OK, text)


def _all_compared(backend: str, own: Mapping[str, Operation]) -> Finding:
    found = {name: operation() for name, operation in own.items()}
    wrong = [f"{_wrong(each)} of {name}" for name, each in found.items() if each.num_wrong]
    if wrong:
        return _off("float16", backend, f"{'; '.join(wrong)} by {_BY[backend]} are further off than they may be")
    count, share = sum(each.num_numbers for each in found.values()), max(each.share for each in found.values())
    text = f"{count:,} numbers of {len(found)} operations beside float64, off by at most {share:.2f} of what is allowed"
    return Finding("float16", Status.OK, text)


def _wrong(found: Comparison) -> str:
    return f"{found.num_wrong:,} of {found.num_numbers:,} numbers"


def _off(name: str, backend: str, text: str) -> Finding:
    meanwhile = "TS_PARALLEL_ISA=none" if backend == "native" else "dtype: float32"
    return Finding(
        name, Status.FAIL, text, f"answers would be wrong; report it with this page, and set {meanwhile} until then"
    )
