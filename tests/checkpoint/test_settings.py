"""A model's configuration is with its weights, or beside the folder that torch.distributed.checkpoint made."""

from __future__ import annotations

from pathlib import Path

import pytest

from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.errors import CheckpointError


@pytest.fixture
def step(tmp_path: Path) -> Path:
    folder = tmp_path / "step-100"
    folder.mkdir()
    (tmp_path / "config.json").touch()
    return folder


def test_configuration_above_belongs_to_a_distributed_checkpoint(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (step / ".metadata").touch()
    assert settings_folder(step) == step.parent
    monkeypatch.chdir(step)
    assert settings_folder(Path(".")) == step.parent


def test_configuration_within_comes_first(step: Path) -> None:
    for name in (".metadata", "config.json"):
        (step / name).touch()
    assert settings_folder(step) == step


def test_configuration_that_is_named_comes_before_any_other(step: Path, tmp_path: Path) -> None:
    (step / "config.json").touch()
    named = tmp_path / "named"
    named.mkdir()
    with pytest.raises(CheckpointError, match=f"no config.json in {named}$"):
        settings_folder(step, named)
    (named / "config.json").touch()
    assert settings_folder(step, named) == named


def test_configuration_above_belongs_to_no_other_checkpoint(step: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no config.json in {step}$"):
        settings_folder(step)


def test_distributed_checkpoint_without_a_configuration_is_refused_with_what_to_do(step: Path) -> None:
    (step / ".metadata").touch()
    (step.parent / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"in {step} nor in {step.parent}: .* copy the model's own"):
        settings_folder(step)
