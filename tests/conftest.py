"""What holds for every test."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Triton's kernels run in its interpreter here, which has to be asked for before anybody imports it, as torch does.
os.environ.setdefault("TRITON_INTERPRET", "1")

from programs import make_here

from ts_parallel.partition import prepared
from ts_parallel.partition.prepared import CACHE_VARIABLE

# Files are dealt out to workers one by one. Those that take longest come first, so that no worker waits for the other.
_LONGEST = (
    "exactness/test_family_table.py",
    "partition/model/test_encoder.py",
    "serving/batch/test_seq2seq.py",
    "exactness/test_tokens.py",
    "cli/test_cli.py",
    "cli/test_doctor.py",
    "serving/batch/test_batch_inference.py",
    "cli/test_drain.py",
    "test_pages.py",
    "serving/torchserve/test_deployment.py",
    "partition/test_prepared.py",
    "checkpoint/folders/test_rank_shards.py",
    "gateway/test_gateway.py",
    "gateway/test_faults.py",
)
# What `./tests/run --quick` leaves out beside ranks and servers: a file of these takes half a minute and more.
_THOROUGH = (
    *_LONGEST,
    *(f"exactness/test_{name}.py" for name in ("16_bits", "mixes")),
    *(f"partition/test_{name}.py" for name in ("build", "load_packed", "strangers")),
    *(f"partition/model/test_{name}.py" for name in ("causal_lm", "deferred")),
    *(f"partition/graph/test_{name}.py" for name in ("stages", "trace")),
    *(f"partition/tensor_parallel/test_{name}.py" for name in ("shard", "state")),
    *("serving/batch/test_apis.py", "serving/batch/test_fuzz_batch.py", "serving/batch/speech/test_recordings.py"),
    *("runtime/test_runner.py", "runtime/backends/test_sublayers.py"),
    *("gateway/test_page.py", "gateway/batch/test_batch_routes.py"),
    *(f"runtime/backends/cuda/test_cuda_{name}.py" for name in ("attention", "steps", "compile")),
    *(f"examples/test_{name}.py" for name in ("benchmark", "load_test", "gpu_check")),
    *("cli/test_startup.py", "serving/torchserve/test_rank_watch.py"),
)
# What it takes in all the same: a model behind a real TorchServe, and one over ranks.
_QUICK = ("serving/torchserve/test_torchserve.py", "exactness/test_expert_parallel.py")


@pytest.fixture(scope="session", autouse=True)
def _own_program_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that one test makes, in the process of tests, serve the next, in whichever worker, and the ranks that
    tests start. The user's own cache neither helps nor grows."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "programs"
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ[CACHE_VARIABLE] = str(folder)
    prepared._make = make_here


@pytest.hookimpl(tryfirst=True)  # before markers choose
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    assert all((tests / name).is_file() for name in (*_THOROUGH, *_QUICK)), "a file was moved: mend its name above"
    place = {tests / name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))  # which leaves the order of the others
    for marker, files in ((pytest.mark.thorough, _THOROUGH), (pytest.mark.quick, _QUICK)):
        own = {tests / name for name in files}
        for item in items:
            if item.path in own:
                item.add_marker(marker)


def pytest_collection_finish() -> None:
    gc.freeze()  # half a million objects of modules, through which each collection would go
