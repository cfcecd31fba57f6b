"""Areas of images, one for each class that some pixel has, as transformers' pipeline gives them; masks are PNG."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers import PretrainedConfig

from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.serving.batch.images.reading import ImageReader
from ts_parallel.serving.batch.jobs import Done, Inputs, Work
from ts_parallel.serving.exchange import RawRequest

_MOST_NUMBERS = 2**29  # of all classes at an image's own size, which the processor makes at once: 2 GiB


class AreaApi:
    """`[classes, y, x]` of an image → its areas."""

    def __init__(self, reader: ImageReader, config: PretrainedConfig) -> None:
        """
        Raises:
            CheckpointError: the folder's image processor knows no areas.
        """
        self._reader = reader
        self._names: dict[int, str] = config.id2label or {}
        self._num_classes = int(config.num_labels)
        kind = type(reader.processor)
        if not hasattr(reader.processor, "post_process_semantic_segmentation"):
            raise CheckpointError(f"the folder's image processor {kind.__name__} cannot find areas")

    def open(self, item: RawRequest) -> Work:
        """
        Raises:
            RequestError: the body has no image, or a field that is unknown.
        """
        fields = self._reader.fields(item)
        sizes: list[tuple[int, int]] = []

        def read() -> Inputs:
            picture = self._reader.read(fields)
            (height, width), most = picture.size, _MOST_NUMBERS // self._num_classes
            if height * width > most:
                raise RequestError(
                    f"the image has {width} × {height} pixels, masks of {self._num_classes} classes are made of at "
                    f"most {most}: send it smaller",
                    "image",
                )
            sizes.append(picture.size)
            return picture.inputs

        return Work([read], lambda done: self._areas(done[0], sizes[0]))

    def as_named(self, output: torch.Tensor) -> dict[str, Any]:
        """What the model says, for whoever goes on with it."""
        return {"logits": output.float().tolist()}

    def _areas(self, done: Done, size: tuple[int, int]) -> list[dict[str, Any]]:
        said = SimpleNamespace(logits=done.output.float().unsqueeze(0))
        (classes,) = self._reader.processor.post_process_semantic_segmentation(said, target_sizes=[size])
        return [
            {"score": None, "label": self._names.get(index, f"LABEL_{index}"), "mask": _png(classes == index)}
            for index in classes.unique().tolist()
        ]


def _png(mask: torch.Tensor) -> str:
    """Black and white, in base64."""
    file = io.BytesIO()
    Image.fromarray((mask.numpy() * 255).astype("uint8")).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
