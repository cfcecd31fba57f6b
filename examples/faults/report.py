"""What came of many trials, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from faults.kinds import Fault
from faults.trial import Outcome

SECONDS_TO_REFUSE = 5.0
_HEAD = (
    "fault",
    "times",
    "in flight",
    "hung",
    "wrong",
    "another's",
    "clients knew (s)",
    "right again (s)",
    "left",
    "what clients saw",
)


@dataclass
class Row:
    """All trials of one fault, or why there is none."""

    fault: Fault
    outcomes: list[Outcome] = field(default_factory=list)
    skipped: str = ""

    def total(self, name: str) -> int:
        return sum(getattr(outcome, name) for outcome in self.outcomes)

    @property
    def known(self) -> list[float]:
        return [seconds for outcome in self.outcomes for seconds in outcome.known]

    @property
    def recovered(self) -> list[float]:
        return [outcome.recovered for outcome in self.outcomes if outcome.recovered is not None]

    def complaints(self) -> list[str]:
        """What must not be."""
        if self.skipped:
            return []
        found = [
            f"{self.fault.name}: {self.total(name)} {name}"
            for name in ("hung", "wrong", "of_another")
            if self.total(name)
        ]
        if never := len(self.outcomes) - len(self.recovered):
            found.append(f"{self.fault.name}: {never} times not right again")
        if self.fault.is_unnoticed and self.known:
            found.append(f"{self.fault.name}: {len(self.known)} requests were broken off")
        if self.known and max(self.known) > self.fault.seconds_to_know:
            found.append(f"{self.fault.name}: a client knew after {max(self.known):.1f} s")
        refused = [seconds for outcome in self.outcomes for seconds in outcome.refused]
        if refused and max(refused) > SECONDS_TO_REFUSE:
            found.append(f"{self.fault.name}: a client was refused after {max(refused):.1f} s")
        found += [f"{self.fault.name}: {end}" for outcome in self.outcomes for end in outcome.ends if "without" in end]
        found += [f"{self.fault.name}: left {text}" for outcome in self.outcomes for text in outcome.left]
        return found

    def cells(self) -> list[str]:
        if self.skipped:
            return [self.fault.what, "0", *[""] * 7, f"not tried: {self.skipped}"]
        ends = sum((outcome.ends for outcome in self.outcomes), Counter[str]())
        counts = [str(self.total(name)) for name in ("in_flight", "hung", "wrong", "of_another")]
        saw = ", ".join(f"{count} {end}" for end, count in ends.most_common())
        refused = [seconds for outcome in self.outcomes for seconds in outcome.refused]
        if refused:
            answered = [seconds for outcome in self.outcomes for seconds in outcome.answered]
            saw += f"; refused after {_spread(refused)} s, answered after {_spread(answered)} s"
        left = str(sum(len(outcome.left) for outcome in self.outcomes))
        return [
            self.fault.what,
            str(len(self.outcomes)),
            *counts,
            _spread(self.known),
            _spread(self.recovered),
            left,
            saw,
        ]


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f}, worst {max(seconds):.1f}" if seconds else "–"


def table(rows: Sequence[Row]) -> str:
    lines = [list(_HEAD), ["---"] * len(_HEAD), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine() -> str:
    num_cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()}, {num_cores} cores, Python {platform.python_version()}, {date.today()}"


def write_json(path: Path, rows: Sequence[Row], command: str) -> None:
    content: dict[str, Any] = {"command": command, "machine": machine(), "faults": {}}
    for row in rows:
        trials = [outcome.as_json() for outcome in row.outcomes]
        content["faults"][row.fault.name] = {"what": row.fault.what, "trials": trials, "skipped": row.skipped}
    path.write_text(json.dumps(content, indent=1))
