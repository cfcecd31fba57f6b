"""No dependency of a version that is known to be unsafe: by pip-audit where it can ask, and by a table of our own."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from places import ROOT

CONSTRAINTS = ROOT / "tests" / "constraints.txt"
# The first version without a fault by which a request, a checkpoint or a file could do harm, and the fault.
SAFE_FROM = {
    "certifi": ("2024.7.4", "CVE-2024-39689"),
    "filelock": ("3.20.1", "CVE-2025-68146"),
    "h11": ("0.16.0", "CVE-2025-43859"),
    "idna": ("3.7", "CVE-2024-3651"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
    "pillow": ("11.3.0", "CVE-2025-48379"),
    "protobuf": ("6.31.1", "CVE-2025-4565"),
    "requests": ("2.32.4", "CVE-2024-47081"),
    "setuptools": ("78.1.1", "CVE-2025-47273"),
    "starlette": ("0.49.1", "CVE-2025-62727"),
    "torch": ("2.6.0", "CVE-2025-32434"),
    "urllib3": ("2.6.0", "CVE-2025-66418"),
}
_NO_NETWORK = (
    "ConnectionError",
    "Max retries",
    "Failed to connect",
    "ServiceError",
    "timed out",
    "proxy",
)


def pinned() -> dict[str, Version]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.\-]+==[\w.+!]+", line) for line in lines)  # each is one version
    names = dict(line.split("==") for line in lines)
    return {name.lower().replace("_", "-"): Version(number) for name, number in names.items()}


def test_no_pinned_version_is_known_to_be_unsafe() -> None:
    own = pinned()
    known = {name: own[name] for name in SAFE_FROM if name in own}
    assert len(known) > 5
    assert {name: str(version) for name, version in known.items() if version < Version(SAFE_FROM[name][0])} == {}


def test_no_version_that_is_asked_for_may_be_unsafe() -> None:
    """Of what comes with the package itself."""
    wanted = [
        Requirement(own) for own in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    for own in wanted:
        safe, fault = SAFE_FROM.get(own.name, ("0", ""))
        lowest = [Version(part.version) for part in own.specifier if part.operator in (">=", "==")]
        assert not lowest or min(lowest) >= Version(safe), f"{own} has {fault}"


def test_pip_audit_knows_of_nothing(tmp_path: Path) -> None:
    program = shutil.which("pip-audit")
    if program is None:
        pytest.skip("pip-audit is not installed")
    command = [program, "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    except subprocess.TimeoutExpired:
        pytest.skip("nobody answers pip-audit")
    if result.returncode and any(word in result.stderr for word in _NO_NETWORK):
        pytest.skip("nobody answers pip-audit")
    assert result.returncode == 0, result.stdout
