"""Who computes here: the processor and the backend. Whether rightly, arithmetic.py asks."""

from __future__ import annotations

import torch

from ts_parallel.cli.doctor.finding import Finding, Status, judged
from ts_parallel.machine import Machine
from ts_parallel.runtime.backends.choose import describe_choice, kernel_variants

_CPU = torch.device("cpu")
BY = {"native": "the package's kernels", "torch": "torch's own functions"}


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
    text = "; ".join(f"{name} by {BY[choice.backend]}, {choice.instruction_set}" for name, choice in chosen.items())
    if chosen["bfloat16"].backend == "torch":
        advice = f"no kernels, for {chosen['bfloat16'].why}; float32 is faster, and what dtype: auto means here"
    else:
        advice = ""
        text += f" ({chosen['bfloat16'].why}: {', '.join(kernel_variants())})"
    return judged("backend", text, advice, Status.WARNING)
