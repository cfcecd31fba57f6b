"""What a request for an image brings: a file's bytes, a form or JSON with one, or pixels → a model's input."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor

from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.partition.model.encoder import PIXELS, ModelCall
from ts_parallel.serving.batch.answers import numbers_field
from ts_parallel.serving.batch.jobs import known_names
from ts_parallel.serving.exchange import RawRequest, echo

SOURCES = ("image", "file", PIXELS)
"""Fields of which a body has one."""
_NUMBERS = ("threshold",)  # of forms, which have bytes alone


@dataclass(frozen=True)
class Picture:
    inputs: dict[str, torch.Tensor]
    """`pixel_values` `[C, Y, X]`."""
    size: tuple[int, int]
    """Height and width as the image came."""


class ImageReader:
    """Owns the folder's image processor. Called from several threads at once."""

    def __init__(self, folder: Path, call: ModelCall) -> None:
        """
        Raises:
            CheckpointError: the folder has no image processor that can be used.
        """
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(
                settings_folder(folder), backend="pil", local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"no usable image processor in {folder}: {str(error).splitlines()[0]}") from None
        spec = call.inputs[PIXELS]
        self._shape, self._dtype = spec.sizes[1:], spec.dtype
        self._limits = {letter: (call.least.get(letter, 1), most) for letter, most in call.limits.items()}

    def __call__(self, item: RawRequest) -> dict[str, torch.Tensor]:
        """The input of a body that says nothing beside its image.

        Raises:
            RequestError: the body is no image that can be read, or pixels of another shape than the model's.
        """
        return self.read(self.fields(item)).inputs

    def fields(self, item: RawRequest, others: Sequence[str] = ()) -> dict[str, Any]:
        """The body's fields: one of `SOURCES`, and those of `others` that it has.

        Raises:
            RequestError: there is another, or there are none or several of `SOURCES`.
        """
        if isinstance(item.body, (bytes, bytearray)) and "json" not in item.content_type:
            return {"image": bytes(item.body)}
        given = item.fields()
        if "multipart/" in item.content_type:
            given = {name: _of_form(name, value) for name, value in given.items()}
        fields = known_names({name: value for name, value in given.items() if value is not None}, (*SOURCES, *others))
        sources = [name for name in SOURCES if name in fields]
        if len(sources) != 1:
            raise RequestError(f"the body must have one of {list(SOURCES)}, got {sources or 'none'}", PIXELS)
        return fields

    def read(self, fields: Mapping[str, Any]) -> Picture:
        """
        Raises:
            RequestError: its image cannot be read, or its pixels have another shape than the model's.
        """
        if PIXELS in fields:
            pixels = numbers_field(fields[PIXELS], PIXELS)
            size = (int(pixels.shape[-2]), int(pixels.shape[-1])) if pixels.dim() > 1 else (0, 0)
        else:
            name = next(name for name in SOURCES if name in fields)
            image = _image(_file(fields[name], name), name)
            pixels, size = self._processed(image), (image.height, image.width)
        if len(pixels.shape) != len(self._shape) or not all(map(self._is_taken, pixels.shape, self._shape)):
            raise RequestError(f"pixel_values has shape {list(pixels.shape)}, the model takes {self._taken()}", PIXELS)
        return Picture({PIXELS: pixels.to(self._dtype)}, size)

    def _processed(self, image: Image.Image) -> torch.Tensor:
        try:
            made = self.processor(images=image, return_tensors="pt")
        except ValueError as error:  # an image that is thinner than what it is to be scaled to
            raise RequestError(f"the image of {image.width} × {image.height} cannot be processed: {error}") from None
        mask = made.get("pixel_mask")
        if mask is not None and not bool(mask.all()):
            raise RequestError("the model's image processor fills images up, which cannot be served: remove pad_size")
        pixels: torch.Tensor = made[PIXELS][0]
        return pixels

    def _is_taken(self, size: int, wanted: int | str) -> bool:
        if isinstance(wanted, int):
            return size == wanted
        least, most = self._limits[wanted]
        return least <= size <= most

    def _taken(self) -> str:
        sizes = (str(own) if isinstance(own, int) else "{} to {}".format(*self._limits[own]) for own in self._shape)
        return f"[{', '.join(sizes)}]"


def threshold_of(fields: Mapping[str, Any], usual: float) -> float:
    """
    Raises:
        RequestError: the field is no number from 0 to 1.
    """
    value = fields.get("threshold", usual)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise RequestError(f"'threshold' must be a number from 0 to 1, got {echo(value)}", "threshold")
    return float(value)


def _of_form(name: str, value: Any) -> Any:
    if name not in _NUMBERS or not isinstance(value, (bytes, bytearray)):
        return bytes(value) if isinstance(value, bytearray) else value
    try:
        return float(value)
    except ValueError:
        raise RequestError(f"{name!r} must be a number, got {echo(bytes(value))}", name) from None


def _file(value: Any, name: str) -> bytes:
    """Bytes as they are, of JSON in base64, with or without a data URL's beginning."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str):
        raise RequestError(f"{name!r} must be an image file in base64, got {echo(value)}", name)
    try:
        return base64.b64decode(value.partition(";base64,")[2] or value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name!r} must be an image file in base64: {error}", name) from None


def _image(file: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(file)).convert("RGB")
    # What Pillow raises for a file that is broken depends on its format.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise RequestError(f"the body is no image that can be read: {error}", name) from None
