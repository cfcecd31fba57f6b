"""`ts-parallel doctor` on this machine, and on one where this or that is missing, full or wrong."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from ts_parallel.cli.doctor import arithmetic, computing, host, loopback, software
from ts_parallel.cli.doctor.finding import Finding, Status
from ts_parallel.machine import Machine
from ts_parallel.partition.prepared import CACHE_VARIABLE
from ts_parallel.runtime.backends.choose import kernel_variants

COMMAND = str(Path(sys.executable).parent / "ts-parallel")
PROGRAM = "from ts_parallel.cli.main import main; main()"
SUBJECTS = [
    *("versions", "processor", "backend", "linear bfloat16", "attention", "norm", "rotary", "argmax", "float16"),
    *("Java", "memory"),
    *("huge pages", "shared memory", "temporary folder", "trace cache", "ports", "ranks over gloo"),
]
LINE = re.compile(r"(ok|warning|FAIL) +(.{17}) (.+)")
AVX2_ALONE = {
    "TS_PARALLEL_ISA": "none",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def run(**changes: str | None) -> tuple[int, dict[str, tuple[str, str]], str]:
    """Exit status, each subject's status and text, and the last line."""
    environment = {**os.environ, **{key: value for key, value in changes.items() if value is not None}}
    for key in (key for key, value in changes.items() if value is None):
        environment.pop(key, None)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "doctor"], capture_output=True, text=True, timeout=180, env=environment
    )
    assert result.stderr == ""
    return result.returncode, *read(result.stdout)


def read(output: str) -> tuple[dict[str, tuple[str, str]], str]:
    *lines, last = output.splitlines()
    found = {}
    for line in lines:
        match = LINE.fullmatch(line)
        assert match is not None, line
        found[match[2].strip()] = (match[1], match[3])
    return found, last


def test_this_machine_has_all_that_is_needed_and_a_screen_says_so() -> None:
    status, found, last = run()
    counts = Counter(state for state, _ in found.values())
    failed = {name for name, (state, _) in found.items() if state == "FAIL"}
    assert failed <= ({"Java"} if shutil.which("java") is None else set()), found  # of tests, few need that
    assert status == bool(failed)
    integers = ["linear int8", "linear int4"] if kernel_variants() else []
    assert list(found) == [*SUBJECTS[:4], *integers, *SUBJECTS[4:]]
    assert len(found) < 24
    assert last.startswith(f"{counts['ok']} ok")
    for name, (state, text) in found.items():
        if name in ("attention", "norm", "rotary", "argmax", "float16") or name.startswith("linear"):
            assert state == "ok" and re.search(r"numbers( of [57] operations)? beside float64", text)
    assert f"torch {torch.__version__.partition('+')[0]}" in found["versions"][1]
    assert all(variant in found["backend"][1] for variant in kernel_variants()[:1])
    assert found["ranks over gloo"] == ("ok", "2 processes on loopback have added up")


def test_what_is_missing_is_told_with_what_to_do_and_the_status(tmp_path: Path) -> None:
    """A machine with AVX2 alone, without Java, with a cache that cannot be written, whose ranks cannot talk."""
    (tmp_path / "file").touch()
    missing: dict[str, str | None] = {"PATH": str(tmp_path), "JAVA_HOME": None, **AVX2_ALONE}
    status, found, last = run(
        **missing,
        **{CACHE_VARIABLE: str(tmp_path / "file" / "cache"), "TMPDIR": str(tmp_path / "file")},
        GLOO_SOCKET_IFNAME="no-such-interface",
    )
    assert status == 1
    assert found["Java"][0] == "FAIL" and "install Java 11 or later" in found["Java"][1]
    assert found["ranks over gloo"][0] == "FAIL" and "set GLOO_SOCKET_IFNAME=lo" in found["ranks over gloo"][1]
    assert found["trace cache"][0] == "warning" and f"by {CACHE_VARIABLE}" in found["trace cache"][1]
    assert found["temporary folder"][0] == "warning" and "set TMPDIR to a folder" in found["temporary folder"][1]
    assert found["backend"][0] == "warning"
    assert found["backend"][1].startswith("bfloat16 by torch's own functions, AVX2; float16 by torch's own functions")
    assert {found[name][0] for name in ("linear bfloat16", "attention", "norm", "rotary", "argmax", "float16")} == {
        "ok"
    }
    assert "2 FAIL" in last


def broken(how: str, folder: Path) -> dict[str, str]:
    """What to add to the environment of a `doctor` whose backend is broken: lines of Python that know its `kind`."""
    setting = f"""
import sys
if "ts_parallel.cli.doctor.arithmetic" in sys.orig_argv:
    import os, signal, torch
    from ts_parallel.runtime.backends.choose import choose_backend
    kind = type(choose_backend(torch.device("cpu"), torch.bfloat16))
    right = kind.make_norm
    {how}
"""
    (folder / "sitecustomize.py").write_text(setting)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def test_kernel_that_answers_wrong_fails(tmp_path: Path) -> None:
    norm = "kind.make_norm = lambda *own: lambda hidden: right(*own)(hidden) * 1.02"
    status, found, _ = run(**broken(f"{norm}; kind.rotary = lambda *_: 1 / 0", tmp_path))
    assert status == 1
    state, text = found["norm"]
    assert state == "FAIL" and re.search(r"^[\d,]+ of 30,720 numbers by .* are off by more than \|x\|/100", text)
    assert ("TS_PARALLEL_ISA=none" if kernel_variants() else "dtype: float32") in text
    assert found["rotary"][0] == found["float16"][0] == "FAIL"
    assert all("the check ended by ZeroDivisionError" in found[name][1] for name in ("rotary", "float16"))
    assert found["argmax"][0] == "ok"  # the others follow


def test_float16_that_is_computed_wrong_names_the_operations(tmp_path: Path) -> None:
    rounded = "kind.make_norm = lambda *own: lambda hidden: right(*own)(hidden).bfloat16().to(hidden.dtype)"
    _, found, _ = run(**broken(rounded, tmp_path))
    state, text = found["float16"]
    assert found["norm"][0] == "ok"
    assert state == "FAIL" and re.search(r"[\d,]+ of 30,720 numbers of norm by ", text)
    assert "are further off than they may be" in text and "of rotary" not in text


def test_instruction_that_the_processor_has_not_ends_its_line_alone(tmp_path: Path) -> None:
    status, found, last = run(**broken("kind.rotary = lambda *_: os.kill(os.getpid(), signal.SIGILL)", tmp_path))
    assert status == 1
    for name in ("rotary", "float16"):
        state, text = found[name]
        assert state == "FAIL" and text.startswith("the process that computed it ended with SIGILL: "), text
        assert ("TS_PARALLEL_ISA=none" if kernel_variants() else "dtype: float32") in text
    assert {found[name][0] for name in ("norm", "argmax", "linear bfloat16")} == {"ok"}
    assert list(found)[-1] == "ranks over gloo" and "2 FAIL" in last


def test_operation_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = broken("import time; kind.rotary = lambda *_: time.sleep(600)", tmp_path)
    monkeypatch.setenv("PYTHONPATH", own["PYTHONPATH"])
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {}
    with arithmetic.in_own_process() as process:
        for name, check in process.checks():
            if name == "float16":
                break
            monkeypatch.setattr(arithmetic, "_SECONDS", 1.0 if name == "rotary" else 100.0)
            found[name] = check()
        last = psutil.Process(process._process.pid)
    assert found["rotary"].status == Status.FAIL and found["rotary"].text == "no answer after 1 s"
    assert found["norm"].status == found["argmax"].status == Status.OK
    assert not last.is_running()


def status_of(finding: Finding) -> Status:
    """A line that is not ok says what to do."""
    assert (finding.status == Status.OK) == (not finding.advice), finding.line
    return finding.status


def java_that_says(text: str, folder: Path, status: int = 0) -> None:
    (folder / "java").write_text(f"#!/bin/sh\necho '{text}' >&2\nexit {status}\n")
    (folder / "java").chmod(0o755)


@pytest.mark.parametrize(
    ("says", "status"),
    [
        ('openjdk version "17.0.12" 2024-07-16', Status.OK),
        ('java version "11.0.2"', Status.OK),
        ('java version "1.8.0_412"', Status.FAIL),
        ("what?", Status.WARNING),
    ],
)
def test_java_is_asked_for_its_version(
    says: str, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    java_that_says(says, tmp_path)
    assert status_of(software.java()) == status
    java_that_says(says, tmp_path, status=1)
    assert status_of(software.java()) == Status.FAIL


def test_library_that_is_too_old_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert status_of(software.versions()) == Status.OK
    needs = ["torch>=99", "no-such-thing>=1; extra == 'test'", "nobody-has-this==1.0"]
    monkeypatch.setattr(software, "requires", lambda _: needs)
    found = software.versions()
    assert found.status == Status.FAIL and found.advice == "pip install 'torch>=99' 'nobody-has-this==1.0'"


@pytest.mark.parametrize(("free", "status"), [(2**20, Status.FAIL), (2**29, Status.WARNING), (2**33, Status.OK)])
def test_folder_that_is_full_is_told(
    free: int, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert status_of(host.temporary_folder()) == status
    assert status_of(host.shared_memory(tmp_path)) == (Status.OK if status == Status.OK else Status.WARNING)


def test_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(host.tempfile, "gettempdir", lambda: str(file / "folder"))
    found = host.temporary_folder()
    assert status_of(found) == Status.FAIL and "cannot be written to (Not a directory)" in found.text
    assert status_of(host.shared_memory(tmp_path / "none")) == Status.WARNING


def test_folder_that_is_full_only_once_it_is_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a quota does it: room is shown, and none is given."""

    def full(*_: Any, **__: Any) -> Any:
        return Path("/dev/full").open("wb", buffering=0)

    monkeypatch.setattr(host.tempfile, "TemporaryFile", full)
    found = host.shared_memory(tmp_path)
    assert status_of(found) == Status.WARNING and "No space left on device" in found.text


@pytest.mark.parametrize(("free", "status"), [(2**28, Status.FAIL), (2**30, Status.WARNING), (2**32, Status.OK)])
def test_memory_that_no_worker_fits_in_fails(free: int, status: Status) -> None:
    assert status_of(host.memory(free)) == status


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("always [madvise] never", Status.OK),
        ("[always] madvise never", Status.OK),
        ("always madvise [never]", Status.WARNING),
        (None, Status.WARNING),
    ],
)
def test_huge_pages_are_looked_for(text: str | None, status: Status, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "enabled").write_text(f"{text}\n")
    assert status_of(host.huge_pages(tmp_path / "enabled")) == status


def test_port_that_somebody_listens_on_is_named() -> None:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen()
        port = own.getsockname()[1]
        found = host.ports([port])
        assert status_of(found) == Status.WARNING and f"{port} (TCP) taken" in found.text
    assert status_of(host.ports([port])) == Status.OK


@pytest.mark.parametrize(("quota", "status"), [(None, Status.OK), (4.0, Status.OK), (1.5, Status.WARNING)])
def test_quota_below_the_cores_is_told(quota: float | None, status: Status) -> None:
    found = computing.processor(Machine("a CPU", 4, ("AVX2",)), quota)
    assert status_of(found) == status
    assert found.text == "a CPU, 4 cores, AVX2"


def test_ranks_that_are_late_fail_and_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "_SECONDS", 0.1)
    with loopback.two_ranks() as ranks:
        started: list[Callable[[], bool]] = [psutil.Process(each.pid).is_running for each in ranks._processes]
        found = ranks.finding()
    assert status_of(found) == Status.FAIL and "no sum after 0.1 s" in found.text
    assert not any(is_running() for is_running in started)
