"""What a gateway is told at its start, and the figures that it joins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ts_parallel.cli.server.gateway import gateway
from ts_parallel.errors import ConfigError
from ts_parallel.gateway.counters import joined
from ts_parallel.gateway.run import listening
from ts_parallel.gateway.settings import UpstreamSettings, parse_upstream, parse_upstreams


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://h:8080/predictions/demo", UpstreamSettings("demo", "h", 8080, "/predictions/demo/1.0")),
        ("x=http://h:8080/predictions/demo/2.0/", UpstreamSettings("x", "h", 8080, "/predictions/demo/2.0")),
        ("a.b=https://h/predictions/d", UpstreamSettings("a.b", "h", 443, "/predictions/d/1.0", True)),
        ("http://[::1]:80/predictions/d", UpstreamSettings("d", "::1", 80, "/predictions/d/1.0")),
    ],
)
def test_upstream_is_a_name_and_a_url(text: str, expected: UpstreamSettings) -> None:
    assert parse_upstream(text) == expected
    assert expected.served_name in text


@pytest.mark.parametrize(
    "text",
    [
        "demo",
        "demo=",
        "ftp://h/predictions/d",
        "http://h:8080/v1",
        "http:///predictions/d",
        "http://h:x/predictions/d",
        "http://h/predictions/d?x=1",
        "a b=http://h/predictions/d",
        "=http://h/predictions/",
    ],
)
def test_what_is_no_model_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_upstream(text)
    assert "--upstream" in str(refusal.value) and "\n" not in str(refusal.value)


def test_two_of_one_name_and_none_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="two upstreams are called 'd'"):
        parse_upstreams(["http://a/predictions/d", "d=http://b/predictions/e"])
    with pytest.raises(ConfigError, match="at least one model"):
        parse_upstreams([])


def test_port_that_is_taken_is_refused_in_one_line() -> None:
    with listening("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="choose another port"):
        gateway(["http://h/predictions/d"], port=taken.getsockname()[1])


def test_size_that_is_none_is_refused_by_its_option() -> None:
    with pytest.raises(ConfigError, match="--max-request-size"):
        gateway(["http://h/predictions/d"], max_request_size="many")


def test_key_is_that_of_the_file_at_the_time(tmp_path: Path) -> None:
    file = tmp_path / "key_file.json"
    own = parse_upstream("http://h/predictions/d", file)
    with pytest.raises(OSError):
        own.key()
    for key in ("one", "two"):
        file.write_text(f'{{"inference": {{"key": "{key}"}}}}')
        assert own.key() == key
    file.write_text("{}")
    with pytest.raises(ValueError, match="no inference key"):
        own.key()


def test_gateway_starts_without_torch_numpy_and_transformers() -> None:
    script = (
        "import sys, ts_parallel.cli.main, ts_parallel.cli.server.gateway;"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_families_of_several_texts_are_joined_each_once() -> None:
    one = '# HELP a Of a.\n# TYPE a histogram\na_bucket{m="1",le="1"} 1\na_sum{m="1"} 2\n# TYPE b gauge\nb{m="1"} 3\n'
    other = one.replace('m="1"', 'm="2"')
    lines = joined([one, "", other, "loose 1\n"]).splitlines()
    assert lines == [
        *("# HELP a Of a.", "# TYPE a histogram"),
        *('a_bucket{m="1",le="1"} 1', 'a_sum{m="1"} 2', 'a_bucket{m="2",le="1"} 1', 'a_sum{m="2"} 2'),
        *("# TYPE b gauge", 'b{m="1"} 3', 'b{m="2"} 3'),
        "loose 1",
    ]
