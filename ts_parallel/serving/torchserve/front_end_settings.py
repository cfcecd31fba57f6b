"""What the front end that started this process was told, found out as TorchServe 0.12.0 itself does (ConfigManager).

It hands its workers few of its settings, so its process is looked at: command line, environment, folder, and the file
that these name. A file that was changed after the front end had started is read as it is now.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

DEFAULT_MESSAGE_SIZE = 6_553_500
_LINE_THAT_GOES_ON = re.compile(r"(?<!\\)((?:\\\\)*)\\\n[ \t\f]*")
_PROPERTY = re.compile(r"((?:\\.|[^\\=:\s])+)[ \t\f]*[=:]?[ \t\f]*(.*)")
_VARIABLE = re.compile(r"\$\$([^$]+)\$\$")


def find_front_end() -> psutil.Process | None:
    """The Java process that this one is a descendant of."""
    return next((parent for parent in psutil.Process().parents() if "java" in parent.name()), None)


@dataclass(frozen=True)
class MessageSizes:
    """Most bytes of a body that the front end takes: of its clients, and of its worker."""

    max_request_size: int = DEFAULT_MESSAGE_SIZE
    max_response_size: int = DEFAULT_MESSAGE_SIZE


def message_sizes() -> MessageSizes:
    """TorchServe's defaults where they cannot be known."""
    try:
        front_end = find_front_end()
        settings = {} if front_end is None else read_settings(front_end)
        sizes = (int(settings.get(key, DEFAULT_MESSAGE_SIZE)) for key in ("max_request_size", "max_response_size"))
        return MessageSizes(*sizes)
    except (OSError, ValueError, KeyError, psutil.Error) as error:
        logger.warning(
            "TorchServe's settings cannot be read (%s): max_request_size and max_response_size are taken for %d",
            error,
            DEFAULT_MESSAGE_SIZE,
        )
        return MessageSizes()


def read_settings(front_end: psutil.Process) -> dict[str, str]:
    """The keys of config.properties as they count for a front end.

    Raises:
        OSError, psutil.Error: its process or its file cannot be read.
        KeyError: the file names an environment variable that is not set.
    """
    environment = front_end.environ()
    file = _settings_file(front_end, environment)
    text = file.read_text("latin-1") if file is not None and file.is_file() else ""
    settings = {
        key: _VARIABLE.sub(lambda match: environment[match[1]], value) for key, value in parse_properties(text).items()
    }
    if settings.get("enable_envvars_config", "").lower() == "true":
        own = {name.removeprefix("TS_"): value for name, value in environment.items() if name.startswith("TS_")}
        settings |= {name.lower(): value for name, value in own.items() if name.isupper()}
    return settings


def parse_properties(text: str) -> dict[str, str]:
    """A file of Java's java.util.Properties, without its escapes for letters beyond latin-1."""
    lines = (line.strip(" \t\f") for line in _LINE_THAT_GOES_ON.sub(r"\1", text).split("\n"))
    found = (_PROPERTY.match(line) for line in lines if not line.startswith(("#", "!")))
    return {_unescaped(match[1]): _unescaped(match[2]) for match in found if match}


def _settings_file(front_end: psutil.Process, environment: Mapping[str, str]) -> Path | None:
    """By precedence: environment, command line, the last snapshot, Java's property, the folder it was started in."""
    command, folder = front_end.cmdline(), Path(front_end.cwd())
    if named := environment.get("TS_CONFIG_FILE"):
        return folder / named
    if files := [value for flag, value in pairwise(command) if flag in ("-f", "--ts-config-file")]:
        return folder / files[0]
    if not {"-ncs", "--no-config-snapshot"} & set(command):
        snapshots = (folder / environment.get("LOG_LOCATION", "logs") / "config").glob("*.cfg")
        if last := max(snapshots, key=lambda file: file.name, default=None):
            return last
    option = "-DtsConfigFile="
    properties = [part.removeprefix(option) for part in command if part.startswith(option)]
    return folder / (properties[-1] if properties else "config.properties")


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)
