"""What one check has found, as a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """Serving works, slower or with less than could be."""
    FAIL = "FAIL"
    """Something that serving needs is missing or wrong."""


@dataclass(frozen=True)
class Finding:
    subject: str
    status: Status
    text: str
    advice: str = ""
    """What to do; empty where all is well."""

    @property
    def line(self) -> str:
        said = f"{self.text}: {self.advice}" if self.advice else self.text
        return f"{self.status:8} {self.subject:17} {said}"


def judged(subject: str, text: str, advice: str, worst: Status) -> Finding:
    """`worst` where there is advice, else well."""
    return Finding(subject, worst if advice else Status.OK, text, advice)


Check = Callable[[], Finding]


def finding_of(name: str, check: Check) -> Finding:
    """A check that breaks is a finding too, and the others follow."""
    try:
        return check()
    except Exception as error:
        text = f"the check ended by {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return Finding(name, Status.FAIL, text, "report it with this page")
