"""What the checks have found: a line of JSON for each as it ends, and of all of them one file and one page."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]


class Report:
    """Of one section. Owns its file, to which every check's outcome is added at once."""

    def __init__(self, section: str, out: Path) -> None:
        self._section = section
        self._file = self.file_of(out, section)

    @staticmethod
    def file_of(out: Path, section: str) -> Path:
        return out / f"section_{section}.jsonl"

    def check(self, name: str, run: Callable[[], Found]) -> Found | None:
        """Run a check; what it found, or None if it failed. `is_right: False` among that is a failure too."""
        started = time.perf_counter()
        try:
            found = run()
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {error}", traceback.format_exc(limit=-6))
            return None
        self._write(name, found.get("is_right", True), time.perf_counter() - started, found)
        return found

    def fail(self, name: str, why: str, trace: str = "") -> None:
        self._write(name, False, 0.0, {"why": why[:2000], "trace": trace[-4000:]})

    def skip(self, name: str, why: str) -> None:
        self._write(name, None, 0.0, {"why": why})

    def _write(self, name: str, is_right: bool | None, seconds: float, found: Found) -> None:
        line = {"section": self._section, "check": name, "ok": is_right, "seconds": round(seconds, 2), "found": found}
        with self._file.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
        word = {True: "ok", False: "FAILED", None: "left out"}[is_right]
        told = ", ".join(f"{key} {_short(value)}" for key, value in found.items() if key != "trace")
        print(f"  {word}: {name}: {told}"[:400], flush=True)


def write_report(out: Path, sections: Sequence[str]) -> int:
    """`gpu_check.json` and `gpu_check.md` of what there is; how many checks have failed."""
    lines = []
    for section in sections:
        for line in Report.file_of(out, section).read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:  # the process was ended while it wrote
                continue
    (out / "gpu_check.json").write_text(json.dumps(lines, indent=1))
    (out / "gpu_check.md").write_text(_page(lines))
    return sum(line["ok"] is False for line in lines)


def _page(lines: Sequence[Mapping[str, Any]]) -> str:
    page = ["# What the GPU has shown", ""]
    failed = [line for line in lines if line["ok"] is False]
    page += [f"{len(lines)} checks, {len(failed)} failed.", ""]
    for line in failed:
        page.append(f"- **{line['section']}: {line['check']}**: {line['found'].get('why') or line['found']}")
    for section in dict.fromkeys(line["section"] for line in lines):
        own = [line for line in lines if line["section"] == section]
        page += ["", f"## {section}", ""]
        by_keys: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for line in own:
            if line["ok"] is not False or "trace" not in line["found"]:
                by_keys.setdefault(tuple(line["found"]), []).append(line)
        for keys, rows in by_keys.items():  # checks that found the same kind of thing share a table
            page += [f"| check | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
            for row in rows:
                cells = [_short(row["found"][key]).replace("|", "/") for key in keys]
                page.append(f"| {row['check']} | {' | '.join(cells)} |")
            page.append("")
    for line in failed:
        if trace := line["found"].get("trace"):
            page += ["", f"### {line['section']}: {line['check']}", "", "```text", trace.rstrip(), "```"]
    return "\n".join(page) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
