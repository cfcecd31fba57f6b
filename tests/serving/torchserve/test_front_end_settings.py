"""A front end's settings, found where TorchServe's own ConfigManager finds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from ts_parallel.serving.torchserve import front_end_settings
from ts_parallel.serving.torchserve.front_end_settings import (
    DEFAULT_MESSAGE_SIZE,
    message_sizes,
    parse_properties,
    read_settings,
)


class FrontEnd:
    """A Java process as psutil shows it."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self._folder, self._arguments, self._environment = folder, arguments, environment

    def cmdline(self) -> Sequence[str]:
        return ["java", "-cp", ".", "org.pytorch.serve.ModelServer", "--python", "python", *self._arguments]

    def cwd(self) -> str:
        return str(self._folder)

    def environ(self) -> dict[str, str]:
        return self._environment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that differ in what they say, wherever TorchServe may look for one."""
    (tmp_path / "logs" / "config").mkdir(parents=True)
    for size, name in enumerate(["config.properties", "own.properties", "named", "java"], 1):
        (tmp_path / name).write_text(f"max_response_size={size}\n")
    for size, when in enumerate(["20300101000000000-startup.cfg", "20291231235959999-shutdown.cfg"], 5):
        (tmp_path / "logs" / "config" / when).write_text(f"max_response_size={size}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["-ncs"], {}, "1"),
        (["-ncs", "-f", "own.properties"], {}, "2"),
        (["-f", "own.properties"], {"TS_CONFIG_FILE": "named"}, "3"),
        (["-ncs", "-DtsConfigFile=java"], {}, "4"),
        ([], {}, "5"),
        ([], {"LOG_LOCATION": "elsewhere"}, "1"),
        (["-ncs", "-f", "missing"], {}, None),
        (["-ncs"], {"TS_MAX_RESPONSE_SIZE": "9"}, "1"),
    ],
)
def test_file_is_the_one_that_torchserve_reads(
    folder: Path, arguments: list[str], environment: dict[str, str], expected: str | None
) -> None:
    assert read_settings(FrontEnd(folder, *arguments, **environment)).get("max_response_size") == expected  # type: ignore[arg-type]


def test_environment_counts_more_than_the_file_where_it_is_let(folder: Path) -> None:
    (folder / "config.properties").write_text(
        "enable_envvars_config=True\nmax_response_size=1\njob_queue_size=$$SIZE$$0"
    )
    settings = read_settings(FrontEnd(folder, "-ncs", TS_MAX_RESPONSE_SIZE="9", SIZE="3"))  # type: ignore[arg-type]
    assert (settings["max_response_size"], settings["job_queue_size"]) == ("9", "30")


def test_properties_are_read_as_java_reads_them() -> None:
    text = "# a=1\n ! b=2\n\nc = 3 \n\td:4\ne 5\nf\ng=a \\\n   b\nh\\ i=x=y\naddress=http\\://[\\:\\:]\\:80\nc=6\nlast\\\\\n"
    assert parse_properties(text) == {
        "c": "6",
        "d": "4",
        "e": "5",
        "f": "",
        "g": "a b",
        "h i": "x=y",
        "address": "http://[::]:80",
        "last\\": "",
    }


def test_torchserves_default_is_taken_where_nothing_is_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def hidden() -> None:
        raise psutil.AccessDenied(1)

    (folder / "config.properties").write_text("max_response_size=many")
    for found in (lambda: None, lambda: FrontEnd(folder, "-ncs", "-f", "missing")):
        monkeypatch.setattr(front_end_settings, "find_front_end", found)
        assert message_sizes().max_response_size == DEFAULT_MESSAGE_SIZE
    assert not caplog.records
    for found in (lambda: FrontEnd(folder, "-ncs"), hidden):
        monkeypatch.setattr(front_end_settings, "find_front_end", found)
        assert message_sizes().max_response_size == DEFAULT_MESSAGE_SIZE
    assert caplog.text.count("cannot be read") == 2
