"""Objects in images, with their boxes, as the folder's own processor and transformers' pipeline make them of logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import PretrainedConfig

from ts_parallel.errors import CheckpointError
from ts_parallel.serving.batch.images.reading import ImageReader, threshold_of
from ts_parallel.serving.batch.jobs import Done, Inputs, Work
from ts_parallel.serving.exchange import RawRequest

_LEAST_SCORE = 0.5  # as the pipeline's
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


OTHERS = ("threshold",)
"""Fields beside the image."""


class ObjectApi:
    """`[Q, classes + 4]` of an image → its objects."""

    def __init__(self, reader: ImageReader, config: PretrainedConfig) -> None:
        """
        Raises:
            CheckpointError: the folder's image processor knows no objects.
        """
        self._reader = reader
        self._names: dict[int, str] = config.id2label or {}
        kind = type(reader.processor)
        if not hasattr(reader.processor, "post_process_object_detection"):
            raise CheckpointError(f"the folder's image processor {kind.__name__} cannot find objects")

    def open(self, item: RawRequest) -> Work:
        """
        Raises:
            RequestError: the body has no image, or a field that is unknown or out of its limits.
        """
        fields = self._reader.fields(item, OTHERS)
        threshold = threshold_of(fields, _LEAST_SCORE)
        sizes: list[tuple[int, int]] = []

        def read() -> Inputs:
            picture = self._reader.read(fields)
            sizes.append(picture.size)
            return picture.inputs

        return Work([read], lambda done: self._objects(done[0], sizes[0], threshold))

    def as_named(self, output: torch.Tensor) -> dict[str, Any]:
        """What the model says, for whoever goes on with it: boxes are centres and sizes, as parts of the image's."""
        return {"logits": output[:, :-4].float().tolist(), "pred_boxes": output[:, -4:].float().tolist()}

    def _objects(self, done: Done, size: tuple[int, int], threshold: float) -> list[dict[str, Any]]:
        output = done.output.float().unsqueeze(0)
        said = SimpleNamespace(logits=output[..., :-4], pred_boxes=output[..., -4:])
        (found,) = self._reader.processor.post_process_object_detection(said, threshold, torch.tensor([size]))
        rows = zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].int().tolist(), strict=True)
        return [
            {"score": score, "label": self._name(label), "box": dict(zip(_CORNERS, box, strict=True))}
            for score, label, box in rows
        ]

    def _name(self, index: int) -> str:
        return self._names.get(index, f"LABEL_{index}")
