"""The matrix of clients names the versions that are installed for tests, and every client that is asked."""

from __future__ import annotations

import re
import tomllib

from client_programs import PROGRAMS
from places import ROOT


def rows() -> dict[str, str]:
    """Client → version, as the page has them."""
    page = (ROOT / "ts_parallel" / "gateway" / "README.md").read_text()
    section = page.partition("\n## Clients\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| ([a-z-]+) \| ([0-9.]+) \|", section, re.MULTILINE))


def pinned() -> dict[str, str]:
    """Package → version, of the tests' own environment and of the clients'."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*(ROOT / "tests" / "constraints.txt").read_text().splitlines(), *project["dependency-groups"]["clients"]]
    found = (re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[.*\])?==(.+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def test_versions_are_those_that_are_installed() -> None:
    assert rows() and rows() == {client: pinned()[client] for client in rows()}


def test_every_client_that_has_a_program_has_a_row() -> None:
    told = {name for program in PROGRAMS.glob("ask_*.py") for name in _first_told(program.read_text())}
    assert told == rows().keys()


def _first_told(program: str) -> list[str]:
    """The packages whose versions it tells, without those that its client stands on."""
    (names,) = re.findall(r"^tell\((.*)\)$", program, re.MULTILINE)
    own = re.findall(r'"([^"]+)"', names)
    return own if "requests" in own else own[:1]
