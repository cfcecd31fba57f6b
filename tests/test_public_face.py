"""What programs import is at the package's top, and costs nothing until it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import ts_parallel


def modules_after(code: str) -> set[str]:
    code = f"import json, sys; {code}; print(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_every_name_is_what_it_says_it_is() -> None:
    for name in ts_parallel.__all__:
        assert getattr(ts_parallel, name).__name__ == name
        assert name in dir(ts_parallel)


def test_importing_the_package_loads_nothing_of_it() -> None:
    assert {name for name in modules_after("import ts_parallel") if name.startswith("ts_parallel.")} == set()


def test_streaming_handler_needs_neither_torch_nor_transformers() -> None:
    assert not {"torch", "transformers"} & modules_after("from ts_parallel import StreamingHandler")


def test_other_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'open_modle'"):
        ts_parallel.open_modle  # type: ignore[attr-defined]  # noqa: B018
