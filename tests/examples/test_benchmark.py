"""The benchmark's parts, with peers absent: what it says to a measured process, what it does without one, its page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from places import BENCHMARKS

# A measured process without a model: 1 ms for each token of all streams. A task of 13 streams makes it fail, one of 14
# makes it sleep; a `weak` one fails at a whole round of several streams. It starts a child, as torchrun does.
FAKE = """
import subprocess, sys, time
from peers.rounds import Answer, batches, serve_rounds

class Fake:
    about = {"version": "1", "load_seconds": 0.5}

    def __init__(self):
        print("a library's greeting")
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def answer(self, prompts, streams, num_tokens):
        if streams == 13:
            raise ValueError("no thirteen streams")
        if "weak" in sys.argv and streams > 1 and num_tokens == 64:
            raise MemoryError("no room for so many")
        time.sleep(600 if streams == 14 else 0)
        answers = []
        for batch in batches(prompts, streams):
            moments = []
            for _ in range(num_tokens):
                time.sleep(0.001)
                moments.append(time.perf_counter())
            answers += [Answer(list(range(num_tokens)), moments) for _ in batch]
        return answers

serve_rounds(Fake)
"""


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def fake(tmp_path: Path) -> list[str]:
    script = tmp_path / "fake.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n{FAKE}")
    return [sys.executable, str(script)]


def fake_side(name: str, command: list[str]) -> Any:
    from peers.sides import ProcessSide

    return ProcessSide(name, f"the system {name}", tuple(command), asks=2, asks_alone=1)


def test_a_measured_process_is_asked_and_ends_with_its_children(fake: list[str], tmp_path: Path) -> None:
    from peers.process import MeasuredProcess
    from peers.rounds import Task

    process = MeasuredProcess(fake, tmp_path / "log")
    try:
        about = process.introduction(60)
        assert about["version"] == "1" and 0 < about["ready_seconds"] < 60
        reply = process.ask(Task(4, asks=2, num_tokens=5), 60)
        assert reply["token_ids"] == [0, 1, 2, 3, 4]
        assert reply["seconds"] >= 0.010 and 0.001 <= reply["next"] <= reply["slow"]
        family = psutil.Process(process._process.pid).children(recursive=True)
        assert len(family) == 1
    finally:
        process.stop()
    assert not family[0].is_running()
    assert "a library's greeting" in (tmp_path / "log").read_text()  # and not among the replies


def test_a_process_that_fails_or_is_late_says_why_in_one_line(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peers import process as measured
    from peers.process import MeasuredProcess, PeerError
    from peers.rounds import Task

    monkeypatch.setattr(measured, "_SECONDS_TO_END", 0.5)

    for streams, seconds, reason in (
        (13, 60, "ended: ValueError: no thirteen streams"),
        (14, 0.5, "said nothing for 0.5"),
    ):
        process = MeasuredProcess(fake, tmp_path / "log")
        try:
            process.introduction(60)
            with pytest.raises(PeerError, match=reason) as caught:
                process.ask(Task(streams), seconds)
            assert "\n" not in str(caught.value)
        finally:
            process.stop()


def test_who_is_next_waits_until_the_last_is_idle() -> None:
    from peers.process import wait_until_idle

    spin = "import sys, time; end = time.monotonic() + 1\nwhile time.monotonic() < end: pass\ntime.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", spin])
    try:
        time.sleep(0.3)  # it has begun
        started = time.monotonic()
        wait_until_idle(process.pid)
        assert 0.3 < time.monotonic() - started < 2.9
    finally:
        process.kill()
        process.wait()


def test_an_answer_of_another_length_is_no_result() -> None:
    from peers.rounds import Answer, Task, run

    class Short:
        about: dict[str, Any] = {}  # noqa: RUF012

        def answer(self, prompts: list[list[int]], streams: int, num_tokens: int) -> list[Answer]:
            return [Answer([1], [0.0]) for _ in prompts]

    with pytest.raises(AssertionError, match="1 answers of"):
        run(Short(), Task(1, num_tokens=2))


def test_one_that_fails_leaves_the_comparison_and_the_others_go_on(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmark
    from benchmark_report import markdown

    measured = {"bandwidth": 3e10, "flops": 4e11, "product": "float32 by torch", "products": {"float32 by torch": 4e11}}
    monkeypatch.setattr(benchmark, "run_once", lambda *_: json.dumps(measured))
    (tmp_path / "config.json").write_text(json.dumps(benchmark.MODEL))
    broken = fake_side("broken", [sys.executable, "-c", "raise SystemExit('no such model')"])
    sides = [fake_side("engine-1", fake), broken, fake_side("generate", fake)]
    result = benchmark.compare(sides, tmp_path, tmp_path, [1, 2], 2)
    assert result["failed"] == {"broken": "ended: no such model"}
    assert list(result["systems"]) == ["engine-1", "generate"]
    for system in result["systems"].values():
        assert [sorted(row["streams"]) for row in system["rounds"]] == [["1", "2"]] * 2
        assert system["same_tokens"] == 64
        assert 0.001 <= system["rounds"][0]["first"] < 1
        one, two = (system["rounds"][1]["streams"][count]["rate"] for count in ("1", "2"))
        assert one < two < 2000
    page = markdown({**result, "missing": {"vllm": "vllm is not installed"}, "traced_seconds": {"1": 2.0}})
    assert "- vllm: not measured: vllm is not installed" in page and "- broken: failed: ended: no such model" in page
    assert page.count("the system generate") == 3
    head, *_ = page.splitlines()
    machine = result["machine"]
    assert f"{machine['processor']}, {machine['num_cores']} cores" in head and "; bfloat16, in ts_parallel by " in head
    assert machine["instruction_set"] in head
    assert "30.0 GB/s read, 400 GFLOP/s multiplied in float32 by torch (of float32 by torch 400)." in head
    (limit,) = [line for line in page.splitlines() if line.startswith("| limit by the roofline") and "100%" in line]
    assert limit.count("| 100% | 30.0 | 400 | — |") == 2


def test_one_that_fails_midway_keeps_the_figures_that_it_had(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmark
    from benchmark_report import markdown, median_ratio

    measured = {"bandwidth": 3e10, "flops": 4e11, "product": "bfloat16 by torch", "products": {}}
    monkeypatch.setattr(benchmark, "run_once", lambda *_: json.dumps(measured))
    (tmp_path / "config.json").write_text(json.dumps(benchmark.MODEL))
    sides = [fake_side("engine-1", fake), fake_side("weak", [*fake, "weak"])]
    result = benchmark.compare(sides, tmp_path, tmp_path, [1, 2], 2)
    assert result["failed"] == {"weak": "ended: MemoryError: no room for so many"}
    assert [len(system["rounds"]) for system in result["systems"].values()] == [2, 1]
    ratio = median_ratio(result, "weak", "rate", 1)
    assert ratio is not None and ratio > 0
    assert median_ratio(result, "weak", "rate", 2) is None
    page = markdown({**result, "missing": {}, "traced_seconds": {}})
    assert f" | {ratio:.2f} | — | — | — | — | — |" in page  # beside one stream, and nothing of two
    assert "- weak: failed: ended: MemoryError" in page


def test_machine_that_cannot_be_measured_is_named_and_the_comparison_goes_on(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmark
    from benchmark_report import markdown
    from peers.process import PeerError

    calls: list[float] = []

    def run_once(command: list[str], seconds: float) -> str:
        calls.append(seconds)
        raise PeerError(f"roofline was not done after {seconds:g} s")

    monkeypatch.setattr(benchmark, "run_once", run_once)
    (tmp_path / "config.json").write_text(json.dumps(benchmark.MODEL))
    result = benchmark.compare([fake_side("engine-1", fake)], tmp_path, tmp_path, [1], 2)
    assert result["failed"] == {"roofline": "roofline was not done after 60 s"}
    assert len(calls) == 1  # not again in each round
    assert [len(system["rounds"]) for system in result["systems"].values()] == [2]
    page = markdown({**result, "missing": {}, "traced_seconds": {}})
    assert "Roofline: not measured." in page and "- roofline: failed: roofline was not done after 60 s" in page
    assert "limit by the roofline" not in page
    rates = next(line for line in page.splitlines() if line.startswith("| the system engine-1"))
    _, rate, share, read, multiplied, _ = (cell.strip() for cell in rates.strip("|").split("|"))
    assert share == "—" and min(map(float, (rate, read, multiplied))) > 0


def test_system_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    import benchmark

    with benchmark.Comparison([fake_side("a", ["/no/such/program"])], [1]) as comparison:
        comparison.start(tmp_path, tmp_path)
    assert comparison.failed == {"a": "cannot run /no/such/program: No such file or directory"}


def test_product_has_bounded_time_and_one_turn_at_least() -> None:
    from roofline import _SIZES_OF_GEMM, best_rate

    def product(rows: int, columns: int, inner: int) -> Any:
        sizes.append((rows, columns, inner))
        return lambda: time.sleep(2 * rows * columns * inner / 4e9)

    sizes: list[tuple[int, int, int]] = []
    assert 0 < best_rate(product, 0.5) <= 4e9
    assert sizes == [*_SIZES_OF_GEMM[:1]]  # the second would take two seconds and as much to warm up
    assert 0 < best_rate(product, 0.0) <= 4e9


def test_products_are_those_that_this_machine_has() -> None:
    import torch
    from roofline import find_products

    from ts_parallel.runtime.backends.choose import kernel_variants

    products = find_products()
    names = {"float32 by torch", "bfloat16 by torch"}
    assert products.keys() == names | ({"bfloat16 by the kernels"} if kernel_variants() else set())
    for product in products.values():
        made: Any = product(3, 64, 32)()
        assert isinstance(made, torch.Tensor) and made.shape[-2:] == (3, 64)


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmark
    from peers import sides

    monkeypatch.setattr(sides, "PEERS", {"transformers": "transformers", "vllm": "no_module_of_this_name"})
    monkeypatch.setattr(benchmark, "PEERS", sides.PEERS)
    chosen, missing = benchmark.choose_sides([1], {"transformers": "/no/python"}, 2)
    assert [side.name for side in chosen] == ["engine-1", "served-1"]
    assert missing["transformers"] == "/no/python cannot be run"
    assert missing["vllm"].startswith("no_module_of_this_name is not installed for ")


def test_an_installed_peer_is_found_in_its_own_environment() -> None:
    import benchmark

    chosen, missing = benchmark.choose_sides([1, 2], {"transformers": sys.executable}, 2)
    names = [side.name for side in chosen]
    assert names[:6] == ["engine-1", "served-1", "engine-2", "served-2", "generate", "generate-batch"]
    assert "transformers" not in missing


@pytest.mark.parametrize("peer", ["llamacpp", "llamacpp=", "nobody=/bin/python"])
def test_a_wrong_peer_is_refused(peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    import benchmark

    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--peer", peer])
    assert "give NAME=PYTHON, where NAME is one of transformers, llamacpp, vllm" in capsys.readouterr().err


def test_ratios_are_of_the_same_round() -> None:
    from benchmark_report import median_of, median_ratio

    def system(*rates: float) -> dict[str, Any]:
        return {"rounds": [{"first": 1 / rate, "streams": {"8": {"rate": rate}}} for rate in rates]}

    result = {"systems": {"engine-1": system(100, 50, 10), "served-1": system(50, 40, 9)}}
    assert median_ratio(result, "served-1", "rate", 8) == 0.8
    assert median_ratio(result, "served-1", "first") == pytest.approx(1.25)
    assert median_ratio(result, "engine-1", "rate", 8) is None
    assert median_of(result["systems"]["engine-1"], "rate", 8) == 50
    assert median_of(result["systems"]["engine-1"], "next", 8) is None


def test_limit_is_the_slower_of_reading_and_computing() -> None:
    from roofline import Machine, Work, work_of_llama

    machine, work = Machine(bandwidth=200.0, flops=1000.0), Work(layer_parameters=80, head_parameters=20)
    # 200 bytes of weights: 1 s a step to read. A token: 200 FLOP with its head, so 5 of them take 1 s to compute.
    assert work.step_seconds(machine, 1, 1) == 1.0
    assert work.step_seconds(machine, 10, 10) == 2.0
    # 100 prompt tokens, one sampled: 16,000 + 40 FLOP.
    assert work.limit(machine, 1, 100, 3) == {"rate": 3 / (16.04 + 2 * 1.0), "first": 16.04, "next": 1.0}
    # At the limit of memory all of its bandwidth is used, at that of the product all of that.
    assert work.rates(1.0, 1, 1, 1) == (200.0, 200.0)
    assert work.rates(5.0, 10, 1, 1) == (100.0, 1000.0)
    assert work.rates(1.0, 1, 100, 3)[1] * 3 == pytest.approx(16_000 + 40 + 2 * 200)
    sizes = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 10}
    assert work_of_llama({**sizes, "num_hidden_layers": 3, "vocab_size": 7}) == Work(3 * (64 + 64 + 64 + 240), 56)


def test_peak_memory_is_listed_by_rank(tmp_path: Path) -> None:
    from peers.process import peaks_of_family

    grow = "import sys, time; block = bytearray(int(sys.argv[1]) << 20); print(flush=True); time.sleep(600)"
    start = (
        "import os, subprocess, sys\n"
        f"ranks = [subprocess.Popen([sys.executable, '-c', {grow!r}, size], stdout=subprocess.PIPE,\n"
        "    env={**os.environ, 'RANK': rank, 'LOCAL_RANK': rank}) for rank, size in (('1', '90'), ('0', '150'))]\n"
        "for rank in ranks: rank.stdout.readline()\n"
        "print(flush=True)\n"
        "for rank in ranks: rank.wait()\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE)
    try:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        first, second = peaks_of_family(launcher.pid)
        assert 150 <= first < 190 and 90 <= second < 130
    finally:
        for process in psutil.Process(launcher.pid).children(recursive=True):
            process.kill()
        launcher.communicate(timeout=30)


@pytest.mark.ranks
def test_engine_of_two_ranks_answers_rounds(tmp_path: Path) -> None:
    import benchmark
    from peers.process import MeasuredProcess
    from peers.rounds import VOCABULARY, Task

    small = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    benchmark.make_model(tmp_path / "model", {**benchmark.MODEL, **small})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "peers.programs.engine", str(tmp_path / "model")]
    process = MeasuredProcess(command, tmp_path / "log", {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)})
    try:
        about = process.introduction(120)
        assert about["load_seconds"] is not None
        answer = process.ask(Task(3, asks=2, num_tokens=4), 60)
        assert len(answer["token_ids"]) == 4 and answer["next"] < answer["seconds"]
        assert len(process.peaks()) == 2
        ranks = psutil.Process(process._process.pid).children(recursive=True)
    finally:
        process.stop()
    assert process._process.returncode == 0 and not [rank for rank in ranks if rank.is_running()]


def test_plot_is_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmark_plot import draw

    rows = [{"first": 0.1, "streams": {"1": {"rate": 9.0, "next": 0.1, "slow": 0.2}, "8": {"rate": 50.0}}}]
    limit = {count: {"rate": 100.0, "first": 0.1, "next": 0.01} for count in ("1", "8")}
    machine = {"processor": "a CPU", "num_cores": 2, "instruction_set": "AVX2", "dtype": "bfloat16"}
    systems = {"a": {"label": "A", "rounds": rows}}
    result = {"date": "today", "machine": machine, "streams": [1, 8], "systems": systems}
    for number, known in enumerate(({"roofline": [{}], "limit": limit}, {"roofline": []})):
        draw({**result, **known}, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def test_benchmark_ends_what_it_started_when_it_is_ended(fake: list[str], tmp_path: Path) -> None:
    program = (
        "import signal, sys, time; from pathlib import Path\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import benchmark; from peers.sides import ProcessSide\n"
        "benchmark.end_on_sigterm()\n"
        f"side = ProcessSide('a', 'A', {tuple(fake)!r})\n"
        f"with benchmark.Comparison([side], [1]) as comparison:\n"
        f"    comparison.start(Path({str(tmp_path)!r}), Path({str(tmp_path)!r}))\n"
        "    print(flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None
    process.stdout.readline()
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    deadline = time.monotonic() + 10
    while any(each.is_running() for each in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [each for each in family if each.is_running()]
