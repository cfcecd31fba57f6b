"""Objects and areas of images are those of transformers' pipelines, over ranks and stages."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batch_worker import Worker, lone_rank
from PIL import Image
from rank_answers import BOTH, TENSOR_PARALLEL, answers_over_ranks
from transformers import (
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    DetrConfig,
    DetrImageProcessorPil,
    ResNetConfig,
    SegformerConfig,
    SegformerImageProcessorPil,
    SwinConfig,
    ViTImageProcessorPil,
    YolosConfig,
    YolosImageProcessorPil,
    pipeline,
)

from ts_parallel.errors import CheckpointError
from ts_parallel.serving.batch.images import segmentation
from ts_parallel.serving.batch.tasks import make_task

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LABELS = {index: f"thing {index}" for index in range(6)}
FILES = [(0, (50, 40)), (1, (64, 64)), (2, (33, 90))]


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    with lone_rank():
        yield


def picture(seed: int, size: tuple[int, int]) -> bytes:
    """A PNG of coloured tiles."""
    tiles = np.random.default_rng(seed).integers(0, 255, (7, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(tiles).resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


PICTURES = [picture(seed, size) for seed, size in FILES]
IMAGES = [Image.open(io.BytesIO(file)).convert("RGB") for file in PICTURES]


def save(folder: Path, auto_class: Any, config: Any, processor: Any) -> Path:
    """A random model that says several things of an image."""
    torch.manual_seed(4)
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_small = "norm" in name.lower() or "backbone" in name
            parameter.add_(torch.randn_like(parameter), alpha=0.05 if is_small else 0.3)
            if "query_position" in name or name == "class_labels_classifier.weight":
                parameter.normal_(std=3.0 if "query" in name else 1.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def yolos(folder: Path) -> Path:
    config = YolosConfig(**SIZES, image_size=[64, 48], patch_size=8, num_detection_tokens=9, id2label=LABELS)
    processor = YolosImageProcessorPil(size={"height": 64, "width": 48}, do_pad=False)
    return save(folder, AutoModelForObjectDetection, config, processor)


def detr(folder: Path) -> Path:
    """Whose images are of unlike sizes."""
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = DetrConfig(
        **{"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": backbone},
        **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 7, "id2label": LABELS},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    )
    processor = DetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    return save(folder, AutoModelForObjectDetection, config, processor)


def segformer(folder: Path) -> Path:
    config = SegformerConfig(
        **{"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
        **{"decoder_hidden_size": 16, "id2label": LABELS},
    )
    processor = SegformerImageProcessorPil(size={"height": 64, "width": 64})
    return save(folder, AutoModelForSemanticSegmentation, config, processor)


def swin(folder: Path, heads: tuple[int, int] = (2, 4)) -> Path:
    config = SwinConfig(
        **{"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8 * heads[0], "depths": [2, 2]},
        **{"num_heads": list(heads), "id2label": LABELS},
    )
    return save(folder, AutoModelForImageClassification, config, ViTImageProcessorPil(size={"height": 32, "width": 32}))


MAKERS = {"yolos": yolos, "detr": detr, "segformer": segformer, "swin": swin}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


TASKS = {
    "yolos": "object_detection",
    "detr": "object_detection",
    "segformer": "semantic_segmentation",
    "swin": "image_classification",
}
PROCESSORS = {
    "yolos": YolosImageProcessorPil,
    "detr": DetrImageProcessorPil,
    "segformer": SegformerImageProcessorPil,
    "swin": ViTImageProcessorPil,
}


def plainly(name: str, folder: Path, **asked: Any) -> list[Any]:
    kind = {"semantic_segmentation": "image-segmentation"}.get(TASKS[name], TASKS[name].replace("_", "-"))
    plain = pipeline(kind, model=str(folder), image_processor=PROCESSORS[name].from_pretrained(folder))
    return [plain(image, **asked) for image in IMAGES]


def assert_same_objects(answer: Any, expected: Any) -> None:
    assert len(answer) == len(expected)
    for ours, theirs in zip(answer, expected, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-3)
        assert ours["label"] == theirs["label"]
        assert all(abs(ours["box"][corner] - at) <= 1 for corner, at in theirs["box"].items())  # cut, not rounded


def assert_same_areas(answer: Any, expected: Any) -> None:
    assert [own["label"] for own in answer] == [own["label"] for own in expected]
    for ours, theirs in zip(answer, expected, strict=True):
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(ours["mask"]))))
        assert mask.shape == np.asarray(theirs["mask"]).shape
        assert (mask != np.asarray(theirs["mask"])).mean() < 0.01  # where two classes are alike to the last bits


@pytest.mark.parametrize("name", ["yolos", "detr"])
def test_objects_are_those_of_transformers_pipeline(folders: dict[str, Path], name: str) -> None:
    expected = plainly(name, folders[name], threshold=0.2)
    assert sum(map(len, expected)) > 6
    assert len({own["label"] for found in expected for own in found}) > 1
    worker = Worker("object_detection", folders[name])
    bodies = [{"image": base64.b64encode(file).decode(), "threshold": 0.2} for file in PICTURES]
    answers = worker.ask(*bodies, *PICTURES, {**bodies[0], "image": f"data:image/png;base64,{bodies[0]['image']}"})
    for (status, answer), wanted in zip(answers, [*expected, *plainly(name, folders[name]), expected[0]], strict=True):
        assert status == 200, answer
        assert_same_objects(answer, wanted)


def test_form_with_an_image_and_a_threshold_is_taken(folders: dict[str, Path]) -> None:
    worker = Worker("object_detection", folders["yolos"])
    form = {"file": bytearray(PICTURES[0]), "threshold": b"0.2"}
    answer = worker.ask_form(form, {"Content-Type": "multipart/form-data; boundary=b"})
    assert_same_objects(answer, plainly("yolos", folders["yolos"], threshold=0.2)[0])


def test_areas_are_those_of_transformers_pipeline(folders: dict[str, Path]) -> None:
    expected = plainly("segformer", folders["segformer"])
    assert max(map(len, expected)) > 1
    for (status, answer), wanted in zip(
        Worker("semantic_segmentation", folders["segformer"]).ask(*PICTURES), expected, strict=True
    ):
        assert status == 200, answer
        assert_same_areas(answer, wanted)


BAD: list[tuple[str, Any, str]] = [
    ("yolos", b"no image", "no image that can be read"),
    ("yolos", {"image": "a" * 5}, "'image' must be an image file in base64"),
    ("yolos", {"image": 5}, "'image' must be an image file in base64, got 5"),
    ("yolos", {"threshold": 0.5}, "the body must have one of ['image', 'file', 'pixel_values'], got none"),
    ("yolos", {"pixel_values": [[[0.0]]], "threshold": 2}, "'threshold' must be a number from 0 to 1, got 2"),
    ("yolos", {"pixel_values": [[[0.0]]]}, "shape [1, 1, 1], the model takes [3, 64, 48]"),
    ("detr", {"pixel_values": [[[0.0]] * 3]}, "shape [1, 3, 1], the model takes [3, 33 to 4096, 33 to 4096]"),
    ("segformer", {"image": "AAAA", "threshold": 0.5}, "unknown field 'threshold'"),
]


@pytest.mark.parametrize(("name", "body", "says"), BAD)
def test_bad_image_is_refused_alone(folders: dict[str, Path], name: str, body: Any, says: str) -> None:
    (first, _), (status, answer), (last, _) = Worker(TASKS[name], folders[name]).ask(PICTURES[0], body, PICTURES[0])
    assert (first, status, last) == (200, 400, 200)
    assert says in answer["error"]["message"]


def test_image_whose_masks_would_fill_the_memory_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "_MOST_NUMBERS", 6 * 2500)
    worker = Worker("semantic_segmentation", folders["segformer"])
    (first, _), (status, answer) = worker.ask(PICTURES[0], PICTURES[1])
    assert (first, status) == (200, 400)
    assert "64 × 64 pixels, masks of 6 classes are made of at most 2500" in answer["error"]["message"]


def test_folder_whose_processor_knows_no_objects_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["yolos"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(CheckpointError, match="image processor ViTImageProcessorPil cannot find objects"):
        make_task("object_detection", tmp_path, "float32")


@pytest.mark.ranks
def test_two_ranks_and_two_stages_see_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    """Swin's heads are shared by ranks where they can be, and whole where they cannot."""
    odd = swin(tmp_path / "odd", heads=(3, 6))
    bodies = [{"image": base64.b64encode(file).decode()} for file in PICTURES]
    found = [{**body, "threshold": 0.2} for body in bodies]
    asked = {
        folders["yolos"]: ("object_detection", found, BOTH),
        folders["detr"]: ("object_detection", found, [TENSOR_PARALLEL]),
        folders["segformer"]: ("semantic_segmentation", bodies, [TENSOR_PARALLEL]),
        folders["swin"]: ("image_classification", bodies, BOTH),
        odd: ("image_classification", bodies, [TENSOR_PARALLEL]),
    }
    answers = answers_over_ranks(asked, tmp_path)
    for name, folder in {**folders, "odd": odd}.items():
        kind = "swin" if name == "odd" else name
        asks = {"threshold": 0.2} if TASKS[kind] == "object_detection" else {}
        expected = plainly(kind, folder, **asks)
        assert len(answers[folder]) == len(asked[folder][2])
        for own in answers[folder].values():
            for answer, wanted in zip(own, expected, strict=True):
                if kind == "segformer":
                    assert_same_areas(answer, wanted)
                elif kind == "swin":
                    assert [one["label"] for one in answer] == [one["label"] for one in wanted]
                    assert [one["score"] for one in answer] == pytest.approx([one["score"] for one in wanted], rel=1e-3)
                else:
                    assert_same_objects(answer, wanted)
