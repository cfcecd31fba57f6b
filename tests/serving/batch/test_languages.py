"""Languages of models that translate: a request names those of its text and of its answer, and the tokens are those of
`generate` with the same; tokenizers are transformers' own, made of SentencePiece models that the test trains."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from batch_worker import Worker, lone_rank
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    M2M100Config,
    M2M100Tokenizer,
    MBartConfig,
    MBartTokenizer,
    NllbTokenizer,
)

from ts_parallel.serving.text.model_files import read_tokenizer

TEXTS = ["the cat sat on the mat", "stocks fell", "it was yesterday, and it is today"]
SIZES = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64},
}
KINDS = ("nllb", "m2m", "mbart")
LANGUAGES = {"nllb": ("deu_Latn", "fra_Latn"), "m2m": ("de", "fr"), "mbart": ("de_DE", "fr_XX")}


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with lone_rank():
        yield


def train(file: Path, kind: str) -> Path:
    """A SentencePiece model of a few words."""
    made = io.BytesIO()
    settings = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=made, model_type=kind, **settings
    )
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(made.getvalue())
    return file


def tokenizer_of(kind: str, folder: Path) -> Any:
    pieces = train(folder / "sentencepiece.bpe.model", "unigram" if kind == "mbart" else "bpe")
    if kind == "m2m":
        model = sentencepiece.SentencePieceProcessor(str(pieces))
        names = ["<s>", "<pad>", "</s>", "<unk>", *(model.id_to_piece(index) for index in range(3, len(model)))]
        (folder / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
        return M2M100Tokenizer(str(folder / "vocab.json"), str(pieces))
    if kind == "mbart":
        return MBartTokenizer.from_pretrained(folder)
    made = NllbTokenizer.from_pretrained(folder)
    made.add_tokens([*LANGUAGES["nllb"], "eng_Latn"], special_tokens=True)
    return made


@pytest.fixture(scope="module", params=KINDS)
def translator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A random model of the kind, and its tokenizer."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind) / "model"
    tokenizer = tokenizer_of(kind, folder)
    target = LANGUAGES[kind][1]
    start = 2 if kind != "mbart" else tokenizer.convert_tokens_to_ids(target)
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": start}
    config = (MBartConfig if kind == "mbart" else M2M100Config)(**SIZES, **special, vocab_size=len(tokenizer) + 110)
    torch.manual_seed(5)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
        model.get_input_embeddings().weight[4:28] *= 2.0  # so that words are said, not languages
    model.generation_config = GenerationConfig(**special, max_length=16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return kind, folder


@cache
def plain_model(folder: Path) -> tuple[Any, Any]:
    return AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def plainly(kind: str, folder: Path, text: str, source: str | None, target: str | None) -> str:
    """As the model's card says to translate with it."""
    model, tokenizer = plain_model(folder)
    tokenizer.src_lang = source or {"nllb": "eng_Latn", "m2m": "en", "mbart": "en_XX"}[kind]
    asked: dict[str, Any] = {}
    if target is not None:
        token = tokenizer.get_lang_id(target) if kind == "m2m" else tokenizer.convert_tokens_to_ids(target)
        asked = {"decoder_start_token_id" if kind == "mbart" else "forced_bos_token_id": token}
    greedy = {"do_sample": False, "num_beams": 1, "max_length": 16}
    tokens = model.generate(**tokenizer(text, return_tensors="pt"), **greedy, **asked)
    answer: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return answer


def test_request_names_the_languages_of_its_text_and_its_answer(translator: tuple[str, Path]) -> None:
    """Each its own, those that share a micro-batch too; without names, the folder's hold."""
    kind, folder = translator
    one, two = LANGUAGES[kind]
    asked = [(None, None), (one, two), (two, one), (None, one), (one, None), (two, two)]
    bodies = [
        {"text": text, **({"src_lang": source} if source else {}), **({"tgt_lang": target} if target else {})}
        for source, target in asked
        for text in TEXTS[:2]
    ]
    answers = Worker("text2text_generation", folder).ask(*bodies)
    expected = [plainly(kind, folder, text, source, target) for source, target in asked for text in TEXTS[:2]]
    assert answers == [(200, {"text": text}) for text in expected]
    assert len(set(expected)) > 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tgt_lang": "Klingon"}, "'tgt_lang' must be one of ["),
        ({"source_lang": 5}, "'source_lang' must be one of ["),
        ({"src_lang": "{one}", "source_lang": "{two}"}, "'src_lang' and 'source_lang' say different languages"),
        ({"lang": "{one}"}, "unknown field 'lang'"),
    ],
)
def test_language_that_is_not_there_is_refused_alone(
    translator: tuple[str, Path], fields: dict[str, Any], says: str
) -> None:
    kind, folder = translator
    one, two = LANGUAGES[kind]
    body = {"text": "a"} | {
        name: value.format(one=one, two=two) if isinstance(value, str) else value for name, value in fields.items()
    }
    good = {"text": TEXTS[0], "target_lang": one}
    (first, _), (status, answer), (last, _) = Worker("text2text_generation", folder).ask(good, body, good)
    assert (first, status, last) == (200, 400, 200)
    assert says in answer["error"]["message"]


WITHOUT = """
import sys
sys.modules["sentencepiece"] = sys.modules["google.protobuf"] = None
from pathlib import Path
from ts_parallel.errors import CheckpointError
from ts_parallel.serving.text.model_files import read_tokenizer
try:
    read_tokenizer(Path(sys.argv[1]))
except CheckpointError as error:
    print(error)
"""


def test_tokenizer_of_pieces_alone_is_read_and_refused_without_its_libraries(tmp_path: Path) -> None:
    """By name, and not by that of another library."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    own = sentencepiece.SentencePieceProcessor(str(train(tmp_path / "tokenizer.model", "bpe")))
    ids = read_tokenizer(tmp_path)(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert ids == own.encode(TEXTS[0])
    command = [sys.executable, "-c", WITHOUT, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert f"{tmp_path / 'tokenizer.model'} is a SentencePiece model, which needs sentencepiece and protobuf" in said
    assert "pip install 'ts-parallel[sentencepiece]'" in said
