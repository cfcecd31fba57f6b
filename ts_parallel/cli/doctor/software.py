"""What is installed: this package, what it needs, Java; and whether a model's trace can be kept."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from ts_parallel.cli.doctor.finding import Finding, Status, judged
from ts_parallel.cli.server.torchserve import find_java
from ts_parallel.errors import StartupError
from ts_parallel.partition.prepared import CACHE_VARIABLE, find_cache

_OWN = "ts-parallel"
_SHOWN = ("torch", "transformers", "torchserve", "torch-model-archiver", _OWN)
_OLDEST_JAVA = 11
_INSTALL_JAVA = "install Java 11 or later (Debian: apt-get install openjdk-17-jre-headless) or set JAVA_HOME"
_SECONDS_OF_JAVA = 10


def versions() -> Finding:
    """Those of Python and of what models need, beside what this package asks for."""
    shown = [f"Python {platform.python_version()}", *(f"{name} {_version(name) or 'missing'}" for name in _SHOWN)]
    try:
        needed = [Requirement(text) for text in requires(_OWN) or []]
    except PackageNotFoundError:
        advice = "this package runs from a folder, and nobody has looked whether the others fit; pip install it"
        return Finding("versions", Status.WARNING, ", ".join(shown), advice)
    unmet = [str(need) for need in needed if need.marker is None and not _is_met(need)]
    advice = f"pip install {' '.join(repr(need) for need in unmet)}" if unmet else ""
    return judged("versions", ", ".join(shown), advice, Status.FAIL)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_met(need: Requirement) -> bool:
    found = _version(need.name)
    return found is not None and need.specifier.contains(found, prereleases=True)


def java() -> Finding:
    """The one that `serve` would start TorchServe with, and its version."""
    try:
        home = find_java()
    except StartupError:
        return Finding("Java", Status.FAIL, "none was found, and TorchServe is a Java program", _INSTALL_JAVA)
    command = str(Path(home) / "bin" / "java") if home else "java"
    try:
        result = subprocess.run(
            [command, "-version"], capture_output=True, text=True, timeout=_SECONDS_OF_JAVA, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("Java", Status.FAIL, f"{command} cannot be run ({error})", _INSTALL_JAVA)
    found = re.search(r'version "(?:1\.)?(\d+)[^"]*"', result.stderr)
    if found is None:
        return Finding("Java", Status.WARNING, f"{command} does not say its version", "it has to be 11 or later")
    advice = _INSTALL_JAVA if int(found[1]) < _OLDEST_JAVA else ""
    return judged("Java", f"{found[0]}, {command}", advice, Status.FAIL)


def cache() -> Finding:
    """Whether the next start finds what this one has traced."""
    folder, problem = find_cache()
    if folder is not None:
        return Finding("trace cache", Status.OK, str(folder))
    advice = f"each start traces the model anew; name a folder of your own by {CACHE_VARIABLE}"
    return Finding("trace cache", Status.WARNING, problem, advice)
