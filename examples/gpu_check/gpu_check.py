"""Everything that a GPU has to show of ts_parallel, by one command, in less than eight minutes and without a network.

    PYTHONPATH=. python examples/gpu_check/gpu_check.py --out FOLDER

Each section is a process of its own with its own time, so that one that hangs, or breaks the GPU's context, takes none
of the others along; each of its checks is caught and named. FOLDER gets `gpu_check.json` and `gpu_check.md`, both
written anew after every section. `--dry-run` runs all of it on the CPU, at toy size, with Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from gpu_report import Report, write_report

# Section → seconds. Together with what is started in between, less than eight minutes.
SECTIONS = {
    "machine": 45,
    "attention": 75,
    "sampling": 30,
    "families": 90,
    "llama_8b": 110,
    "qwen3_0_6b": 60,
    "mixtral": 40,
}
SECONDS_ALTOGETHER = 460


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check_out"), metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy size")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # the process of one
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # and of a part of one
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.section:
        run_section(arguments.section, arguments.out, arguments.dry_run, arguments.share)
        return 0
    return run_all(arguments.sections, arguments.out, arguments.dry_run)


def run_all(sections: list[str], out: Path, is_dry: bool) -> int:
    """How many checks have failed, at most 99."""
    patience = 10 if is_dry else 1
    end = time.monotonic() + patience * SECONDS_ALTOGETHER
    environment = dict(os.environ)
    if is_dry:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    for section in SECTIONS:  # of an earlier run
        Report.file_of(out, section).unlink(missing_ok=True)
    failed = 0
    for section in sections:
        seconds = min(patience * SECTIONS[section], end - time.monotonic())
        if seconds < 5:
            Report(section, out).fail("the section", "there was no time left for it")
        else:
            print(f"== {section}, at most {seconds:.0f} s", flush=True)
            command = [sys.executable, __file__, "--section", section, "--out", str(out)]
            why = run_process([*command, *(["--dry-run"] if is_dry else [])], environment, seconds)
            if why:
                Report(section, out).fail("the section", why)
        failed = write_report(out, [name for name in SECTIONS if Report.file_of(out, name).exists()])
    print(f"{failed} checks failed: {out / 'gpu_check.md'}")
    return min(failed, 99)


def run_process(command: list[str], environment: dict[str, str], seconds: float) -> str:
    """Why it has not come to its end; whatever it started ends with it."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
        return f"its process ended with {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"its {seconds:.0f} s were over"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_section(section: str, out: Path, is_dry: bool, share: int | None) -> None:
    """In this process."""
    import gpu_correctness
    import gpu_machine
    import gpu_speed

    report = Report(section, out)
    size = "toy" if is_dry else "whole"
    match section:
        case "machine":
            gpu_machine.check(report, size)
        case "attention":
            gpu_correctness.check_attention(report, size, share)
        case "sampling":
            gpu_correctness.check_sampling(report, size)
        case "families":
            gpu_correctness.check_families(report, size, SECTIONS["families"])
        case _:
            gpu_speed.check(report, section, size, SECTIONS[section])


if __name__ == "__main__":
    sys.exit(main())
