"""Folders as sentence-transformers' own `save` writes them, of families that people embed with, over ranks and stages:
the vectors are its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_worker import MINILM, Worker, lone_rank
from rank_answers import BOTH, PIPELINE, TENSOR_PARALLEL, Asked, answers_over_ranks
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from transformers import CONFIG_MAPPING, AutoModel, AutoTokenizer

from ts_parallel.errors import CheckpointError
from ts_parallel.partition.model.sentence_modules import read_modules, read_sentence_modules, transformer_folder
from ts_parallel.serving.batch.texts.reading import read_text_rules

TEXTS = ["A cat sits on the mat.", "Stocks fell.", "The weather is lovely today, and it was yesterday too.", "x"]
SIZES: dict[str, Any] = {
    **{
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 30522,
    },
    **{"max_position_embeddings": 64, "pad_token_id": 0},
}
SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 102)
KEYS = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 101, "eos_token_id": 102}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3": ({**SIZES, **KEYS}, "lasttoken"),
    "gemma3_text": ({**SIZES, **KEYS, "use_bidirectional_attention": True, "sliding_window": 6}, "mean"),
    "nomic_bert": (SIZES, "mean"),
    "gte": ({**SIZES, "hidden_act": "gelu"}, "cls"),
    "jina_embeddings_v3": (SIZES, "mean"),
    "modernbert": ({**SIZES, **SPECIAL, "local_attention": 8, "global_attn_every_n_layers": 2}, "cls"),
}
FUSED = ("nomic_bert", "gte", "jina_embeddings_v3")  # queries, keys and values are stored as one

SHAPES = {"nomic_bert": [TENSOR_PARALLEL], "jina_embeddings_v3": [PIPELINE], "modernbert": [PIPELINE]}


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with lone_rank():
        yield


def plain_model(folder: Path, model_type: str, settings: dict[str, Any]) -> Path:
    """A random model of the family with MiniLM's tokenizer."""
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG_MAPPING[model_type](**settings), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


def saved(folder: Path, plain: Path, *modules: Any, **settings: Any) -> SentenceTransformer:
    """sentence-transformers' own model of the plain one and `modules`, saved to `folder` and read again."""
    model = Transformer(str(plain), max_seq_length=24)
    SentenceTransformer(modules=[model, *modules], device="cpu", **settings).save(str(folder))
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def head_of(model_type: str, pooling: str) -> list[Any]:
    torch.manual_seed(1)
    if model_type == "gemma3_text":  # EmbeddingGemma's
        dense = [
            Dense(32, 64, bias=False, activation_function=None),
            Dense(64, 32, bias=False, activation_function=None),
        ]
        return [Pooling(32, pooling), *dense, Normalize()]
    return [Pooling(32, pooling, include_prompt=model_type != "qwen3"), Normalize()]


def move_model_below(folder: Path, name: str = "0_Transformer") -> None:
    """As version 2 wrote it: the model's and the tokenizer's files in a folder of their own."""
    own = folder / name
    own.mkdir()
    stays = ("modules.json", "config_sentence_transformers.json", "README.md")
    for file in [file for file in folder.iterdir() if file.is_file() and file.name not in stays]:
        file.rename(own / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = name
    (folder / "modules.json").write_text(json.dumps(modules))


def assert_same(vectors: Any, expected: Any, what: str = "vectors") -> None:
    expected = torch.as_tensor(expected)
    assert expected.std() > 0.01
    torch.testing.assert_close(torch.tensor(vectors), expected, rtol=1e-4, atol=1e-5, msg=lambda own: f"{what}: {own}")


@pytest.mark.ranks
def test_vectors_over_two_ranks_and_two_stages_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    """Those of texts of unlike lengths, with a prompt before them; of GTE with its model in a folder below."""
    asked: dict[Path, Asked] = {}
    expected = {}
    for model_type, (settings, pooling) in FAMILIES.items():
        plain = plain_model(tmp_path / f"plain {model_type}", model_type, settings)
        prompts = {"query": "search for: "}
        folder = tmp_path / model_type
        saved(folder, plain, *head_of(model_type, pooling), prompts=prompts, default_prompt_name="query")
        if model_type == "gte":
            move_model_below(folder)
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        expected[folder] = model.encode(TEXTS)
        shapes = SHAPES.get(model_type, BOTH)
        asked[folder] = "text_embedding", [{"text": text} for text in TEXTS], shapes
    for folder, answers in answers_over_ranks(asked, tmp_path).items():
        assert len(answers) == len(asked[folder][2])
        for shape, vectors in answers.items():
            assert_same(vectors, expected[folder], f"{folder.name}, {shape}")


@pytest.mark.parametrize("model_type", FUSED)
def test_family_is_one_that_stores_what_is_taken_apart(model_type: str, tmp_path: Path) -> None:
    """Else the test above would say nothing of it."""
    plain_model(tmp_path, model_type, FAMILIES[model_type][0])
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]
    assert (96, 32) in shapes


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("bert"), "bert", {**SIZES, "num_hidden_layers": 1})


@pytest.mark.parametrize("named", ["whole folder", "model's folder"])
def test_model_in_a_folder_below_is_found_with_what_stands_above(plain: Path, tmp_path: Path, named: str) -> None:
    folder = tmp_path / "home"
    saved(folder, plain, Pooling(32, "max"), prompts={"query": "q: "}, default_prompt_name="query")
    move_model_below(folder, "0_BERT")
    expected = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(TEXTS)
    own = folder if named == "whole folder" else folder / "0_BERT"
    (answer,) = Worker("text_embedding", own).ask({"input": TEXTS})
    assert answer[0] == 200, answer
    assert_same([own["embedding"] for own in answer[1]["data"]], expected)
    assert transformer_folder(folder) == folder / "0_BERT"


def test_what_stands_above_a_model_makes_another_program(plain: Path, tmp_path: Path) -> None:
    """So that a pooling that was changed is not that of the start before."""
    folder = tmp_path / "home"
    saved(folder, plain, Pooling(32, "max"))
    move_model_below(folder)
    before = Worker("text_embedding", folder).ask({"text": "a"})
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32, "pooling_mode": "mean"}')
    assert Worker("text_embedding", folder).ask({"text": "a"}) != before


def test_norms_and_residuals_behind_the_pooling_are_those_of_the_folder(plain: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    norm = LayerNorm(32)
    torch.nn.init.normal_(norm.norm.weight), torch.nn.init.normal_(norm.norm.bias)
    residuals = [
        Dense(32, 32, use_residual=True),
        Dense(32, 12, use_residual=True, activation_function=torch.nn.SiLU()),
    ]
    model = saved(tmp_path / "home", plain, Pooling(32, "mean"), norm, *residuals)
    (answer,) = Worker("text_embedding", tmp_path / "home").ask({"input": TEXTS})
    assert_same([own["embedding"] for own in answer[1]["data"]], model.encode(TEXTS))


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_scores_are_the_folders_own_similarity(plain: Path, tmp_path: Path, name: str) -> None:
    model = saved(tmp_path / "home", plain, Pooling(32, "mean"), similarity_fn_name=name)
    vectors = model.encode(TEXTS)
    expected = model.similarity(vectors[:1], vectors[1:])[0].tolist()
    assert model.similarity_fn_name == name
    (scored, ranked) = Worker("text_embedding", tmp_path / "home").ask(
        {"text_1": TEXTS[0], "text_2": TEXTS[1:]}, {"query": TEXTS[0], "documents": TEXTS[1:]}
    )
    assert [own["score"] for own in scored[1]["data"]] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    best = max(range(3), key=expected.__getitem__)
    assert ranked[1]["results"][0]["index"] == best


REFUSED = [
    ({"modules": "custom_st.Transformer"}, r"'custom_st\.Transformer': code of the checkpoint's own is not run"),
    ({"modules": "sentence_transformers.models.WeightedLayerPooling"}, "a module 'WeightedLayerPooling', which cannot"),
    ({"modules": "sentence_transformers.models.StaticEmbedding"}, "a module 'StaticEmbedding', which cannot be served"),
    ({"similarity": "maxsim"}, r"similarity_fn_name 'maxsim' cannot be served; \['cosine', 'dot'"),
]


@pytest.mark.parametrize(("changed", "says"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, changed: dict[str, str], says: str) -> None:
    kind = changed.get("modules", "sentence_transformers.models.Transformer")
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    similarity = changed.get("similarity", "dot")
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": similarity}))
    with pytest.raises(CheckpointError, match=says):
        read_text_rules(tmp_path, is_cut=True)
        read_sentence_modules(tmp_path)


def test_other_peoples_list_of_modules_above_a_folder_is_left_alone(plain: Path, tmp_path: Path) -> None:
    """Whatever it holds."""
    (tmp_path / "modules.json").write_text('{"name": "npm"}')
    (tmp_path / "model").symlink_to(plain, target_is_directory=True)
    assert transformer_folder(tmp_path / "model") == tmp_path / "model"
    assert read_sentence_modules(tmp_path / "model").poolings == ("mean",)


@pytest.mark.parametrize("path", ["../secret", "/etc", "1_Pooling/../../secret"])
def test_module_of_another_folder_is_refused(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    modules = [{"idx": 0, "name": "0", "path": path, "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="not a folder of its own"):
        read_modules(folder)
