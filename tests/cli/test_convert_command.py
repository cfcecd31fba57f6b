"""`ts-parallel convert`, and `verify` of what it wrote beside the plain model that it came from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from places import DEMO_MODEL
from typer.testing import CliRunner, Result

from ts_parallel.checkpoint.index import SHARD_INDEX
from ts_parallel.cli.convert import Target, convert, make_format
from ts_parallel.cli.main import app
from ts_parallel.cli.verify import check_reference, together, verify
from ts_parallel.errors import ConfigError, StartupError


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    logger = logging.getLogger("ts_parallel.checkpoint")
    level = logger.level
    yield
    logger.setLevel(level)


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "160", "HF_HUB_OFFLINE": "1"}).invoke(app, [str(each) for each in arguments])


@pytest.mark.ranks
def test_what_was_converted_answers_as_the_reference_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run("convert", DEMO_MODEL, tmp_path / "dcp", "--to", "dcp", "--ranks", "2", "--verify")
    assert result.exit_code == 0, result.output
    assert "56 tensors, 3,885,120 bytes, all equal to the source" in result.stdout
    assert "written: 3.9 MB" in caplog.text and "compared: 3.9 MB" in caplog.text
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "dcp" / name).read_bytes() == (DEMO_MODEL / name).read_bytes()
    (tmp_path / "dcp" / "config.json").unlink()
    arguments = ["--reference", DEMO_MODEL, "--config", DEMO_MODEL, "--tensor-parallel-size", "2", "--max-tokens", "8"]
    result = run("verify", tmp_path / "dcp", *arguments)
    assert result.exit_code == 0, result.output
    assert "the same tokens" in result.stdout and result.stdout.count("8 of 8") == 8


def test_shards_have_the_size_that_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(str(DEMO_MODEL), tmp_path / "new", Target.SAFETENSORS, max_shard_size="1MB")
    shards = list((tmp_path / "new").glob("model-*-of-00005.safetensors"))
    assert len(shards) == 5 and all(shard.stat().st_size < 1_010_000 for shard in shards)
    assert (tmp_path / "new" / SHARD_INDEX).is_file()
    assert "56 tensors" in capsys.readouterr().out


def test_source_without_configuration_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").symlink_to(DEMO_MODEL / "model.safetensors")
    convert(str(tmp_path / "weights"), tmp_path / "bare", Target.DCP)
    assert "no config.json was beside the source" in capsys.readouterr().out
    convert(str(tmp_path / "weights"), tmp_path / "whole", Target.DCP, config=DEMO_MODEL)
    assert "no config.json" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--config .*weights has no config\.json"):
        convert(str(tmp_path / "weights"), tmp_path / "new", Target.DCP, config=tmp_path / "weights")


@pytest.mark.parametrize(
    ("target", "ranks", "size", "says"),
    [
        (Target.SAFETENSORS, 2, None, "--ranks 2 goes with --to dcp, not safetensors"),
        (Target.DCP, None, "1GB", "--max-shard-size 1GB goes with --to safetensors, not dcp"),
        (Target.SAFETENSORS, None, "large", "--max-shard-size: 'large' is not a size"),
        (Target.SAFETENSORS, None, "0", "--max-shard-size must be at least 1 byte, got 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    target: Target, ranks: int | None, size: str | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        make_format(target, ranks, size)


def test_verify_that_has_nothing_to_compare_with_says_what_to_add(tmp_path: Path) -> None:
    convert(str(DEMO_MODEL), tmp_path / "dcp", Target.DCP)
    FAMILIES["llama"]().save_pretrained(tmp_path / "other")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "transformers cannot read the weights of .*dcp: name .* with --reference"),
        ({"reference": tmp_path / "other"}, "--reference .*other has a vocabulary of 97 tokens, .*dcp one of 2048"),
        ({"reference": tmp_path}, "no config.json in"),
    ]
    for settings, says in cases:
        with pytest.raises(StartupError, match=says):
            verify(str(tmp_path / "dcp"), **settings)
    (tmp_path / "dcp" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json in .*dcp: name the folder that has it with --config"):
        check_reference(tmp_path / "dcp", DEMO_MODEL)


def test_weights_and_configuration_of_two_folders_come_together_without_a_copy(tmp_path: Path) -> None:
    convert(str(DEMO_MODEL), tmp_path / "dcp", Target.DCP)
    with together(tmp_path / "dcp", DEMO_MODEL) as folder:
        names = {path.name for path in folder.iterdir()}
        assert {".metadata", "__0_0.distcp", "config.json", "tokenizer.json"} <= names
        assert "model.safetensors" not in names
        assert (folder / "__0_0.distcp").samefile(tmp_path / "dcp" / "__0_0.distcp")
        assert (folder / "config.json").samefile(DEMO_MODEL / "config.json")
    assert not folder.exists()
    with together(tmp_path / "dcp", None) as folder:
        assert folder == tmp_path / "dcp"
