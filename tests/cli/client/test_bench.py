"""`ts-parallel bench` against a small server whose delays are known, its arithmetic against figures made by hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sse_server import Answer, Cut, Refusal, chunk, event, running, steady
from typer.testing import CliRunner

from ts_parallel.cli.client.bench import parse_concurrency
from ts_parallel.cli.client.measure import Record, follow, run_load, spread_of, summarize
from ts_parallel.cli.client.stream_client import Piece, RemoteError, Usage
from ts_parallel.cli.client.workload import Ask, PromptMaker, as_words, equal_asks, read_trace, spread
from ts_parallel.cli.main import app
from ts_parallel.errors import ConfigError

# As in test_complete.py: Ctrl-C must be heard wherever pytest runs.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from ts_parallel.cli.main import main; main()"
)


def run(*arguments: str) -> Any:
    """A call in this process; an error that `main` would print is `exception` of what is returned."""
    return CliRunner(env={"OPENAI_API_KEY": None, "COLUMNS": "160"}).invoke(app, ["bench", *arguments])


def table_row(output: str, name: str) -> list[str]:
    """The cells that follow `name` on the one line that begins with it."""
    (line,) = [line for line in output.splitlines() if line.strip().startswith(name)]
    return line.strip().removeprefix(name).split()


def record(
    *moments: float,
    tokens: tuple[float, ...] = (),
    is_counted: bool = True,
    asked: int = 3,
    arrival: float = 0.0,
    error: str | None = None,
) -> Record:
    """Sent at 1 s, ended half a second after its last piece."""
    tokens = tokens or (1.0,) * len(moments)
    ended = (moments[-1] if moments else 1.0) + 0.5
    return Record(Ask(arrival, (5,), asked), 1.0, ended, moments, tokens, is_counted, 7, 2, error)


# --- arithmetic


def test_percentiles_are_interpolated_and_the_mean_is_the_mean() -> None:
    assert spread_of([4.0, 1.0, 3.0, 2.0, 5.0]) == {"count": 5, "p50": 3.0, "p90": 4.6, "p99": 4.96, "mean": 3.0}
    assert spread_of([2.0]) == {"count": 1, "p50": 2.0, "p90": 2.0, "p99": 2.0, "mean": 2.0}
    assert spread_of([]) == {"count": 0, "p50": None, "p90": None, "p99": None, "mean": None}


def test_itl_is_the_time_between_pieces_divided_by_tokens_once_a_token() -> None:
    one = record(1.5, 2.0, 5.0, tokens=(2.0, 1.0, 4.0))
    assert one.ttft == 0.5
    assert one.gaps == [0.5, 3.0]
    assert one.itls == [0.5, 0.75, 0.75, 0.75, 0.75]
    assert sum(one.itls) / len(one.itls) == (5.0 - 1.5) / (
        4 + 1
    )  # last piece less first, by the tokens after the first
    assert one.e2e == 4.5
    assert one.num_output_tokens == 7


def test_estimated_tokens_count_each_piece_once() -> None:
    assert record(1.0, 2.0, 4.0, tokens=(1.5, 1.5, 1.5), is_counted=False).itls == pytest.approx([1 / 1.5, 2 / 1.5])


def test_rates_are_of_whole_answers_from_the_first_sending_to_the_last_end() -> None:
    summary = summarize([record(2.0, 3.0, 4.0), record(2.0, 4.5), record(9.5, error="cut"), record(1.5, error="cut")])
    assert summary["seconds"] == 9.0
    assert summary["requests_per_second"] == pytest.approx(2 / 9)
    assert summary["output_tokens_per_second"] == pytest.approx(5 / 9)
    assert (summary["requests"], summary["failed"], summary["errors"]) == (4, 2, {"cut": 2})
    assert (summary["prompt_tokens"], summary["cached_prompt_tokens"]) == (14, 4)
    assert summary["shorter_than_asked"] == 1
    assert summary["metrics"]["ttft_seconds"]["count"] == 2


def piece(moment: float, text: str, count: int | None = None, has_choice: bool = True) -> Piece:
    return Piece(moment, text, None, None if count is None else Usage(4, count, 0), has_choice)


def test_pieces_are_the_events_that_bring_tokens_as_the_server_counts_them() -> None:
    events = [piece(1, "", 0), piece(2, "a", 1), piece(3, "", 3), piece(4, "b", 3), piece(5, "", 3, has_choice=False)]
    got = follow(Ask(0.0, (1,), 3), events, 0.0)
    assert (got.moments, got.tokens, got.is_counted) == ((2, 3), (1, 2), True)


def test_tokens_are_equal_shares_where_only_the_whole_answer_is_counted() -> None:
    got = follow(Ask(0.0, (1,), 6), [piece(1, ""), piece(2, "a"), piece(3, "b"), piece(4, "", 6, False)], 0.0)
    assert (got.moments, got.tokens, got.is_counted) == ((2, 3), (3, 3), False)


def test_tokens_are_one_a_piece_where_nothing_is_counted() -> None:
    got = follow(Ask(0.0, (1,), 6), [piece(2, "a"), piece(3, "b"), piece(4, "")], 0.0)
    assert (got.moments, got.tokens, got.is_counted, got.num_prompt_tokens) == ((2, 3), (1, 1), False, None)


# --- what is asked, and when


def test_same_seed_makes_the_same_prompts_and_no_two_of_a_run_are_alike() -> None:
    prompts = [ask.prompt for ask in equal_asks(20, 16, 4, PromptMaker(3, 1000))]
    assert prompts == [ask.prompt for ask in equal_asks(20, 16, 4, PromptMaker(3, 1000))]
    assert prompts != [ask.prompt for ask in equal_asks(20, 16, 4, PromptMaker(4, 1000))]
    assert len(set(prompts)) == 20
    assert all(len(prompt) == 16 and all(500 <= int(token) < 1000 for token in prompt) for prompt in prompts)


def test_words_are_as_many_as_the_ids() -> None:
    assert len(as_words(tuple(range(100))).split()) == 100


def test_arrivals_are_poisson_and_the_seeds() -> None:
    asks = equal_asks(4000, 1, 1, PromptMaker(0, 100))
    arrivals = [ask.arrival for ask in spread(asks, 8.0, 1)]
    assert arrivals == [ask.arrival for ask in spread(asks, 8.0, 1)] != [ask.arrival for ask in spread(asks, 8.0, 2)]
    assert arrivals[0] == 0 and arrivals == sorted(arrivals)
    waits = [later - earlier for earlier, later in pairwise(arrivals)]
    mean = sum(waits) / len(waits)
    variance = sum((wait - mean) ** 2 for wait in waits) / len(waits)
    assert mean == pytest.approx(1 / 8, rel=0.05)
    assert variance**0.5 == pytest.approx(mean, rel=0.1)  # an exponential's deviation is its mean


def test_concurrency_is_a_list_of_numbers() -> None:
    assert parse_concurrency("1,8, 32") == (1, 8, 32)


@pytest.mark.parametrize("text", ["", "a", "1,", "0", "4,-1", "1.5"])
def test_concurrency_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no list of numbers of at least 1"):
        parse_concurrency(text)


GOOD_LINE = '{"arrival_seconds": 0.5, "prompt_tokens": 4, "output_tokens": 2}'


def test_trace_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [GOOD_LINE, "", '{"arrival_seconds": 0.5, "prompt": "two words", "output_tokens": 3}']
    lines.append('{"arrival_seconds": 2, "prompt": [7, 8], "output_tokens": 1}')
    file.write_text("\r\n".join(lines) + "\n")
    first, second, third = read_trace(file, PromptMaker(0, 100))
    assert (first.arrival, len(first.prompt), first.num_output_tokens, first.is_random) == (0.5, 4, 2, True)
    assert second == Ask(0.5, "two words", 3, is_random=False)
    assert third == Ask(2.0, (7, 8), 1, is_random=False)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ('{"prompt_tokens": 4, "output_tokens": 2}', "arrival_seconds must be a number of at least 0, got null"),
        ('{"arrival_seconds": -1, "prompt_tokens": 4, "output_tokens": 2}', "arrival_seconds must be .* got -1"),
        ('{"arrival_seconds": NaN, "prompt_tokens": 4, "output_tokens": 2}', "arrival_seconds must be .* got NaN"),
        ('{"arrival_seconds": true, "prompt_tokens": 4, "output_tokens": 2}', "arrival_seconds must be .* got true"),
        ('{"arrival_seconds": 0.1, "prompt_tokens": 4, "output_tokens": 2}', "arrival_seconds 0.1 is before the 0.5"),
        ('{"arrival_seconds": 1, "output_tokens": 2}', "needs either prompt or prompt_tokens"),
        ('{"arrival_seconds": 1, "prompt": "a", "prompt_tokens": 1, "output_tokens": 2}', "needs either"),
        ('{"arrival_seconds": 1, "prompt_tokens": 0, "output_tokens": 2}', "prompt_tokens must be a whole .* got 0"),
        ('{"arrival_seconds": 1, "prompt_tokens": 4.5, "output_tokens": 2}', "prompt_tokens must be .* got 4.5"),
        ('{"arrival_seconds": 1, "prompt_tokens": 4}', "output_tokens must be a whole number .* got null"),
        ('{"arrival_seconds": 1, "prompt_tokens": 4, "output_tokens": "9"}', 'output_tokens must be .* got "9"'),
        ('{"arrival_seconds": 1, "prompt": "", "output_tokens": 2}', "prompt must be"),
        ('{"arrival_seconds": 1, "prompt": [1, -2], "output_tokens": 2}', "prompt must be"),
        ('{"arival_seconds": 1}', "unknown field 'arival_seconds': did you mean 'arrival_seconds'"),
    ],
)
def test_mistake_in_a_trace_is_named_with_its_line_and_field(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(f"{GOOD_LINE}\n\n{line}\n")
    with pytest.raises(ConfigError, match=f"trace.jsonl line 3: {says}"):
        read_trace(file, PromptMaker(0, 100))


def test_trace_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / "none", PromptMaker(0, 100))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="holds no request"):
        read_trace(tmp_path / "empty", PromptMaker(0, 100))


# --- the load itself


def test_fault_of_ours_in_a_thread_is_raised_and_not_waited_for() -> None:
    def send(ask: Ask, origin: float) -> Record:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(run_load([Ask(0.0, (1,), 1)] * 4, 2, send))


def test_closing_a_load_lets_nothing_more_be_sent() -> None:
    sent: list[Ask] = []
    go_on = threading.Event()

    def send(ask: Ask, origin: float) -> Record:
        sent.append(ask)
        if len(sent) > 1:
            go_on.wait(20)
        return record(1.0)

    load = run_load([Ask(0.0, (1,), 1)] * 9, 1, send)
    next(load)
    load.close()  # type: ignore[attr-defined]
    go_on.set()
    time.sleep(0.2)
    assert len(sent) <= 2


def test_times_are_those_of_the_server(tmp_path: Path) -> None:
    """0.3 s to the first piece, then pieces of two tokens every 0.2 s."""
    with running(completions=steady(0.3, 0.2, tokens_of_a_piece=2)) as server:
        file = tmp_path / "out.json"
        arguments = ["--concurrency", "2", "--num-requests", "4", "--output-tokens", "8", "--json", str(file)]
        result = run(server.url, *arguments)
    assert result.exit_code == 0, result.output
    (load,) = json.loads(file.read_text())["loads"]
    assert load["output_tokens"] == 4 * 8
    assert load["tokens_are_estimated"] is False
    metrics = load["metrics"]
    assert [metrics[f"{name}_seconds"]["count"] for name in ("ttft", "itl", "gap", "e2e")] == [4, 4 * 6, 4 * 3, 4]
    for name, expected in {"ttft": 0.3, "itl": 0.1, "gap": 0.2, "e2e": 0.9}.items():
        assert 0.6 * expected < metrics[f"{name}_seconds"]["mean"] < 4 * expected, name
    assert 1.8 <= load["seconds"] < 8
    assert load["output_tokens_per_second"] == pytest.approx(32 / load["seconds"])
    assert load["requests_per_second"] == pytest.approx(4 / load["seconds"])
    assert [len(each["itl_seconds"]) for each in load["records"]] == [6] * 4


def test_table_shows_what_the_file_holds(tmp_path: Path) -> None:
    with running(completions=steady(gap=0.01)) as server:
        file = tmp_path / "out.json"
        result = run(
            server.url, "--concurrency", "3", "--num-requests", "5", "--output-tokens", "4", "--json", str(file)
        )
    written = json.loads(file.read_text())
    load = written["loads"][0]
    assert (written["url"], written["model"], written["refused_extras"]) == (server.url, "demo", [])
    rates, latencies = result.stdout.split("ms", 1)
    assert table_row(rates, "concurrency 3")[:2] == ["5", "0"]
    assert float(table_row(rates, "concurrency 3")[4]) == pytest.approx(load["output_tokens_per_second"], abs=0.06)
    for metric, name in {"itl_seconds": "ITL", "gap_seconds": "GAP", "e2e_seconds": "E2E"}.items():
        *shown, count = map(float, table_row(latencies, name))
        figures = load["metrics"][metric]
        assert shown == pytest.approx([figures[key] * 1e3 for key in ("p50", "p90", "p99", "mean")], abs=0.06)
        assert count == figures["count"]


def test_every_request_is_greedy_ids_that_ignore_the_end_with_counted_pieces() -> None:
    with running(completions=steady()) as server:
        arguments = "--concurrency 1 --num-requests 3 --prompt-tokens 5 --output-tokens 2 --vocabulary 50".split()
        assert run(server.url, *arguments).exit_code == 0
        probe, warm_up, *load = server.bodies
    assert len(load) == 3
    assert len(probe["prompt"]) == 4
    for body in (warm_up, *load):
        prompt = body.pop("prompt")
        assert len(prompt) == 5 and all(25 <= token < 50 for token in prompt)
        counted = {"include_usage": True, "continuous_usage_stats": True}
        sent = {"model": "demo", "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True}
        assert body == {**sent, "stream_options": counted}


def test_as_many_requests_run_as_concurrency_says_and_never_more() -> None:
    with running(completions=steady(delay=0.2)) as server:
        assert run(server.url, "--concurrency", "3", "--num-requests", "9", "--output-tokens", "1").exit_code == 0
        assert server.most_running == 3
        assert len(server.load_bodies) == 9


def test_request_rate_sends_however_many_run() -> None:
    """20 requests a second that each take 0.5 s: about ten run at a time."""
    with running(completions=steady(delay=0.5)) as server:
        arguments = ["--request-rate", "20", "--num-requests", "20", "--output-tokens", "1", "--seed", "5"]
        result = run(server.url, *arguments)
        arrivals = [ask.arrival for ask in spread(equal_asks(20, 1, 1, PromptMaker(0, 100)), 20, 5)]
        came = [moment - server.moments[2] for moment in server.moments[2:]]
    assert result.exit_code == 0, result.output
    assert server.most_running > 3
    assert all(late > -0.5 for late in (at - planned for at, planned in zip(came, arrivals, strict=True)))


def test_bound_of_a_rate_is_kept_and_its_lateness_said() -> None:
    with running(completions=steady(delay=0.1)) as server:
        arguments = ["--request-rate", "1000", "--num-requests", "8", "--output-tokens", "1", "--max-concurrency", "2"]
        result = run(server.url, *arguments)
        assert server.most_running == 2
    assert "s after their arrival: raise --max-concurrency" in result.stdout


def test_trace_is_sent_as_it_says(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"arrival_seconds": 0, "prompt_tokens": 6, "output_tokens": 2}]
    lines.append({"arrival_seconds": 1, "prompt": "one two", "output_tokens": 3})  # type: ignore[dict-item]
    trace.write_text("\n".join(map(json.dumps, lines)))
    with running(completions=steady()) as server:
        result = run(server.url, "--trace", str(trace))
        first, second = server.load_bodies
        assert 0.5 < server.moments[3] - server.moments[2] < 8
    assert result.exit_code == 0, result.output
    assert (len(first["prompt"]), first["max_tokens"]) == (6, 2)
    assert (second["prompt"], second["max_tokens"]) == ("one two", 3)
    assert table_row(result.stdout.split("ms", 1)[0], "trace trace.jsonl")[:2] == ["2", "0"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--concurrency 1 --request-rate 2", "two kinds of load"),
        ("--trace none --concurrency 1", "leave out --concurrency"),
        ("--trace none --prompt-tokens 4", "leave out"),
        ("--json /no/such/folder/file", "cannot write"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_asked(arguments: str, says: str) -> None:
    with running(completions=steady()) as server:
        assert says in str(run(server.url, *arguments.split()).exception)
        assert server.bodies == []


# --- what servers refuse and how they fail


def refusing(*, naming: dict[str, str], also: Answer) -> Answer:
    """Refuses bodies that have one of these, by field or `ids`, with the message that stands for it."""

    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        has = {*body, *(body.get("stream_options") or {}), *(("ids",) if isinstance(body["prompt"], list) else ())}
        for name, message in naming.items():
            if name in has:
                raise Refusal(400, message)
        yield from also(body)

    return answer


@pytest.mark.parametrize(
    ("naming", "refused"),
    [
        ({"continuous_usage_stats": "unknown stream_options"}, ["continuous_usage_stats"]),
        ({"ignore_eos": "Unrecognized request argument: ignore_eos"}, ["ignore_eos"]),
        ({"ids": "prompt: Input should be a valid string"}, ["token ids as prompts"]),
        ({"stream_options": "stream_options?"}, ["continuous_usage_stats", "stream_options"]),
        ({"ignore_eos": "no"}, ["continuous_usage_stats", "ignore_eos"]),
    ],
)
def test_what_the_server_refuses_is_left_out_and_said(naming: dict[str, str], refused: list[str]) -> None:
    with running(completions=refusing(naming=naming, also=steady())) as server:
        result = run(server.url, "--concurrency", "1", "--num-requests", "2", "--output-tokens", "3")
        assert len(server.bodies) == len(refused) + 1 + 1 + 2
        if "token ids as prompts" in refused:
            assert len(server.bodies[-1]["prompt"].split()) == 128
    assert result.exit_code == 0, result.output
    assert f"asked without what the server refuses: {', '.join(refused)}" in result.stdout
    is_estimated = "continuous_usage_stats" in refused
    assert ("does not count each piece's tokens" in result.stdout) is is_estimated


def test_ids_of_a_trace_are_not_replaced_by_words(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_seconds": 0, "prompt": [7, 8], "output_tokens": 1}')
    with running(completions=refusing(naming={"ids": "prompt must be text"}, also=steady())) as server:
        assert "the server takes none" in str(run(server.url, "--trace", str(trace)).exception)


def test_server_that_refuses_everything_is_quoted_with_its_first_reason() -> None:
    reasons = iter(["the engine is off", "b", "c", "d", "e"])

    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        raise Refusal(400, next(reasons))
        yield b""

    with running(completions=answer) as server:
        result = run(server.url, "--concurrency", "1")
        assert len(server.bodies) == 5
    assert isinstance(result.exception, RemoteError)
    assert str(result.exception) == "the server answered 400 to completions: the engine is off"


def test_request_that_is_too_long_ends_before_the_load() -> None:
    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        if len(body["prompt"]) > 100:
            raise Refusal(400, "the limit is 100 tokens")
        yield from steady()(body)

    with running(completions=answer) as server:
        assert "the limit is 100 tokens" in str(run(server.url, "--concurrency", "1").exception)
        assert server.load_bodies == []


def every_third(broken: Answer) -> Answer:
    """Breaks each third request of the load; the probe and the warm-up are answered."""
    numbers = iter(range(-2, 1000))

    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        number = next(numbers)
        yield from (broken if number >= 0 and number % 3 == 0 else steady())(body)

    return answer


def full(body: dict[str, Any]) -> Iterator[bytes]:
    raise Refusal(503, "the queue is full")
    yield b""


def cut(body: dict[str, Any]) -> Iterator[bytes]:
    yield event(chunk("a"))
    raise Cut


def broken_midway(body: dict[str, Any]) -> Iterator[bytes]:
    yield event(chunk("a"))
    yield event({"error": {"message": "the engine failed"}})


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (full, "2 failed: the server answered 503 to completions: the queue is full"),
        (cut, "2 failed: the connection broke"),
        (broken_midway, "2 failed: the engine failed"),
        (steady(delay=2), "2 failed: the answer took longer than 1 s"),
        (steady(gap=2), "2 failed: the answer took longer than 1 s"),
    ],
)
def test_failed_requests_are_counted_shown_and_the_status(tmp_path: Path, broken: Answer, says: str) -> None:
    file = tmp_path / "out.json"
    arguments = ["--num-requests", "6", "--output-tokens", "2", "--timeout", "1", "--json", str(file)]
    with running(completions=every_third(broken)) as server:
        result = run(server.url, "--concurrency", "1", *arguments)
    assert result.exit_code == 1
    assert says in result.stdout
    (load,) = json.loads(file.read_text())["loads"]
    assert (load["requests"], load["failed"], load["metrics"]["e2e_seconds"]["count"]) == (6, 2, 4)
    assert sorted(bool(each["error"]) for each in load["records"]) == [False] * 4 + [True] * 2


def test_load_that_fails_as_a_whole_still_has_a_table() -> None:
    numbers = iter(range(1000))

    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        yield from (full if next(numbers) >= 2 else steady())(body)

    with running(completions=answer) as server:
        result = run(server.url, "--concurrency", "2", "--num-requests", "4")
    assert result.exit_code == 1
    assert table_row(result.stdout, "ITL") == ["–", "–", "–", "–", "0"]


def test_short_answers_and_cached_prompts_are_said() -> None:
    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        yield from steady(num_cached=3)({**body, "max_tokens": 2})

    with running(completions=answer) as server:
        result = run(server.url, "--concurrency", "1", "--num-requests", "2", "--prompt-tokens", "4")
    assert result.exit_code == 0
    assert "concurrency 1: 2 answers were shorter than asked" in result.stdout
    assert "concurrency 1: 6 of 8 prompt tokens came from a prefix cache" in result.stdout


def test_ctrl_c_ends_the_load_at_once_and_shows_the_ones_before() -> None:
    """A load of one token each, then one of 5000 that nobody waits for."""
    numbers = iter(range(1000))

    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        is_last = next(numbers) >= 2 + 2
        yield from steady(gap=0.02)({**body, "max_tokens": 5000 if is_last else 1})

    with running(completions=answer) as server:
        command = [sys.executable, "-c", PROGRAM, "bench", server.url, "--concurrency", "1,2", "--num-requests", "2"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                deadline = time.perf_counter() + 60
                while len(server.bodies) < 6:
                    assert time.perf_counter() < deadline
                    time.sleep(0.02)
                process.send_signal(signal.SIGINT)
                output, errors = process.communicate(timeout=40)
            finally:
                process.kill()
        assert server.has_left.wait(5)
    assert (process.returncode, errors) == (130, "")
    assert table_row(output.split("ms", 1)[0], "concurrency 1")[:2] == ["2", "0"]
    assert "concurrency 2" not in output
