"""A torch.distributed.checkpoint without a configuration takes that of another folder: planned, checked, served."""

from __future__ import annotations

import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from places import DEMO_MODEL
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from ts_parallel.cli.main import app
from ts_parallel.cli.server.archive import handler_config
from ts_parallel.cli.server.serve import check
from ts_parallel.engine.request import GenerationParams
from ts_parallel.errors import CheckpointError
from ts_parallel.partition.prepared import CACHE_VARIABLE
from ts_parallel.serving.offline import open_model

PROMPT = [5, 60, 700, 40, 3]
SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def step(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's weights as torch saves them, and nothing else in the folder or above."""
    folder = tmp_path_factory.mktemp("job") / "step-100"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        save(model.state_dict(), checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's configuration and tokenizer without its weights."""
    folder = tmp_path_factory.mktemp("settings")
    for name in SETTINGS:
        shutil.copy(DEMO_MODEL / name, folder)
    return folder


def test_plan_is_that_of_the_configuration(step: Path, settings: Path) -> None:
    result = run("plan", step, "--config", settings, "--tensor-parallel-size", "2")
    assert result.exit_code == 0, result.output
    assert "model.embed_tokens.weight = lm_head.weight" in result.stdout
    assert "dim 0 in 1024+1024" in result.stdout


def test_without_a_configuration_it_is_said_how_to_name_one(step: Path) -> None:
    result = run("plan", step)
    assert isinstance(result.exception, CheckpointError)
    assert "or name their folder with --config (handler key config_path)" in str(result.exception)


@pytest.mark.parametrize("command", ["plan", "archive", "serve"])
def test_folder_without_a_configuration_is_refused_by_name(command: str, step: Path, tmp_path: Path) -> None:
    assert f"--config {tmp_path} has no config.json" in str(run(command, step, "--config", tmp_path).exception)


def test_archive_names_it_absolutely(
    step: Path, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(settings.parent)
    result = run("archive", step, "--config", settings.name, "--export-path", tmp_path, "--name", "d")
    assert result.exit_code == 0, result.output
    with zipfile.ZipFile(tmp_path / "d.mar") as archive:
        handler = yaml.safe_load(archive.read("model-config.yaml"))["handler"]
    assert (handler["model_path"], handler["config_path"]) == (str(step), str(settings))


@pytest.mark.parametrize("eager", [True, False])
def test_answers_are_those_of_the_model(
    eager: bool, model: Any, step: Path, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `serve` checks before it starts TorchServe, and the engine itself."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "programs"))
    options: dict[str, Any] = {"config_path": str(settings), "dtype": "float32", "kv_cache_memory": "64MiB"}
    if not eager:
        check(handler_config(step, "cpu", **options), step)
    with open_model(step, device="cpu", eager=eager, **options) as offline:
        (answer,) = offline.generate([PROMPT], GenerationParams(24, ignore_eos=True))
    ids = torch.tensor([PROMPT])
    settings_of_generation = {"do_sample": False, "min_new_tokens": 24, "max_new_tokens": 24, "pad_token_id": 1}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **settings_of_generation)
    assert list(answer.token_ids) == plain[0, len(PROMPT) :].tolist()
