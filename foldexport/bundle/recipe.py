"""The card's ``preprocess``: an image to the network's input in numpy and Pillow, as `foldexport.samples` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEEDED = ("input_size", "mean", "std")

TEXT = '''\
import numpy as np
from PIL import Image

def preprocess(path):
    """[1, {channels}, {height}, {width}] {dtype}, {colors}, of an image file."""
    image = Image.open(path).convert("{colors}")
    factor = max({wide} / image.width, {high} / image.height)
    size = (max({width}, round(image.width * factor)), max({height}, round(image.height * factor)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.{interpolation})
    left, top = (image.width - {width}) // 2, (image.height - {height}) // 2
    pixels = np.asarray(image.crop((left, top, left + {width}, top + {height})), dtype=np.float32)
    x = pixels.reshape({height}, {width}, {channels}){scaled}
{normalised}    return np.ascontiguousarray(x.transpose(2, 0, 1)[None]){cast}
'''
NORMALISED = '''\
    mean = np.array({mean}, dtype=np.float32)
    std = np.array({std}, dtype=np.float32)
    x = (x - mean) / std
'''
INTERPOLATIONS = ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS", "BOX", "HAMMING")


def recipe(fields: Mapping[str, Any], dtype: str = "float32") -> str:
    """Python source of ``preprocess(path)``; empty where the size, the mean or the deviation of images is not known."""
    if any(not fields.get(name) for name in NEEDED) or len(fields["input_size"]) != 3:
        return ""
    channels, height, width = fields["input_size"]
    if channels not in (1, 3):
        return ""
    scale = fields.get("crop_pct") or 1.0
    asked = str(fields.get("interpolation", "")).upper()
    top = tuple(fields.get("value_range") or (0, 1))[1]
    mean, std = (tuple(map(float, fields[name])) for name in ("mean", "std"))
    plain = set(mean) == {0.0} and set(std) == {1.0}
    return TEXT.format(
        channels=channels, height=height, width=width, wide=int(width / scale), high=int(height / scale), dtype=dtype,
        colors="RGB" if channels == 3 else "L", interpolation=asked if asked in INTERPOLATIONS else "BILINEAR",
        scaled="" if top == 255 else " / 255.0", normalised="" if plain else NORMALISED.format(mean=mean, std=std),
        cast="" if dtype == "float32" else f".astype(np.{dtype})",
    )  # fmt: skip
