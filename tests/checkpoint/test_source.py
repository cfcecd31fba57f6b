"""A checkpoint is found as a folder, or in the hub's cache, or one line says why not. No test asks the hub."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from ts_parallel.checkpoint import source
from ts_parallel.checkpoint.source import locate_checkpoint
from ts_parallel.errors import CheckpointError


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no network. huggingface_hub reads its environment at import, so its constants are set."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def test_folder_is_found_by_its_absolute_path(tmp_path: Path) -> None:
    assert locate_checkpoint(str(tmp_path)) == tmp_path


def test_folder_is_found_relative_to_the_working_directory_and_to_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_checkpoint("model") == locate_checkpoint("~/model") == tmp_path / "model"


def test_folder_comes_before_a_repository_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "snapshot_download", fail)
    assert locate_checkpoint("owner/model") == tmp_path / "owner" / "model"


def fail(*arguments: object, **keywords: object) -> NoReturn:
    raise AssertionError("the hub was asked")


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "../none/at/all", "~/none", "a/b/c", "-x", "a..b"])
def test_text_that_cannot_be_a_hub_id_is_said_to_be_no_folder(path: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        locate_checkpoint(path)
    assert str(refusal.value) == f"no folder {path}"


@pytest.mark.parametrize(
    "path",
    [
        "~nobody-of-this-name/model",
        "x" * 300,
    ],
)
def test_path_that_the_system_refuses_is_said_to_be_no_folder(path: str) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        locate_checkpoint(path)


def test_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match=f"no folder {file}"):
        locate_checkpoint(str(file))


def test_repository_that_is_not_in_the_cache_is_one_line_without_a_network() -> None:
    with pytest.raises(CheckpointError) as refusal:
        locate_checkpoint("nobody/no-such-model")
    assert str(refusal.value).startswith("nobody/no-such-model is no folder, and the hub gave no such model: ")
    assert "\n" not in str(refusal.value)


def test_repository_that_was_fetched_before_is_found_without_a_network(hub_cache: Path) -> None:
    repository = hub_cache / "models--owner--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert locate_checkpoint("owner/model") == snapshot


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("not in the cache\nTry this and that."), "not in the cache"),
        (OSError("disk full"), "disk full"),
        (ConnectionError(), "ConnectionError"),
    ],
)
def test_hub_error_becomes_its_first_line(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def give_error(*arguments: object, **keywords: object) -> NoReturn:
        raise error

    monkeypatch.setattr(source, "snapshot_download", give_error)
    with pytest.raises(CheckpointError) as refusal:
        locate_checkpoint("owner/model")
    assert str(refusal.value) == f"owner/model is no folder, and the hub gave no such model: {reason}"


WEIGHTS = ["model-1-of-2.safetensors", "model.safetensors.index.json"]
TORCH_WEIGHTS = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"]
COMPANIONS = ["config.json", "tokenizer.model", "tokenizer.json", "merges.txt", "chat_template.jinja"]
COMPANIONS += ["pytorch_model.bin.index.json"]
UNWANTED = ["consolidated.00.pth", "model.pkl", "modeling_x.py", "training_args.bin", "optimizer.bin", "x.h5"]


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_no_code_is_fetched_and_pickled_weights_only_where_there_are_no_others(
    has_safetensors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = WEIGHTS if has_safetensors else []

    def fetch(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "owner/model"
        stored = [*weights, *TORCH_WEIGHTS, *COMPANIONS, *UNWANTED]
        for name in filter_repo_objects(stored, allow_patterns=allow_patterns):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(source, "snapshot_download", fetch)
    assert locate_checkpoint("owner/model") == tmp_path
    fetched = {path.name for path in tmp_path.iterdir()}
    assert fetched == {*COMPANIONS, *(weights or TORCH_WEIGHTS)}
