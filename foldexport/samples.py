"""The user's own inputs for the proofs, from ``--data``: an ``.npz`` of arrays or a folder of images."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foldexport.errors import MissingDependencyError, UsageError
from foldexport.preprocessing import COLOR_ORDER, PIXELS

SAMPLES = 64  # of the first ones, in the order of names
LABELS = "labels"  # the array of an .npz that holds class numbers, not an input
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
WANTED = "an .npz with one array per input (batch first) or a folder of images"


def load(path: Path, preprocessing: Mapping[str, Any]) -> list[np.ndarray]:
    """One array per input of the network, at most `SAMPLES` samples of each, batch first.

    Images are read as RGB and brought to the network's input with its preprocessing (timm's fields, see `as_input`).
    Raises UsageError for anything that is neither, and MissingDependencyError where Pillow is needed and not installed.
    """
    if path.is_dir():
        return [_images(path, preprocessing)]
    if not path.exists():
        raise UsageError(f"--data {path}: there is no such file; wanted {WANTED}.")
    if path.suffix != ".npz":
        raise UsageError(f"--data {path}: wanted {WANTED}.")
    return _arrays(path)


def labelled(path: Path, preprocessing: Mapping[str, Any], limit: int) -> tuple[list[np.ndarray], np.ndarray | None, int]:
    """Many samples, for calibration and accuracy: one array per input, class numbers ``[N]`` or None, the number of classes.

    A folder of images has labels where every image lies in one of its own folders; these are the classes, in the order of their
    names. Images are taken evenly from all of them. An .npz has them in its array "labels". Raises what :func:`load` raises.
    """
    if not path.is_dir():
        load(path, preprocessing)  # refuses what is no .npz
        arrays = _arrays(path, limit)
        with np.load(path, allow_pickle=False) as archive:
            labels = archive[LABELS] if LABELS in archive.files and len(archive.files) > 1 else None
        if labels is None:
            return arrays, None, 0
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) < len(arrays[0]):
            found = f"{labels.dtype} {list(labels.shape)}"
            raise UsageError(f"--data {path}: its labels are {found}; wanted one class number per sample.")
        return arrays, labels[:limit].astype(np.int64), int(labels.max()) + 1
    paths = sorted(each for each in path.rglob("*") if each.suffix.lower() in IMAGE_SUFFIXES)
    classes = sorted({each.parent.name for each in paths if each.parent.parent == path})
    inside = classes and all(each.parent.parent == path for each in paths)
    taken = [paths[place * len(paths) // limit] for place in range(limit)] if len(paths) > limit else paths
    images = [_images(path, preprocessing, taken)]
    if not inside:
        return images, None, 0
    return images, np.asarray([classes.index(each.parent.name) for each in taken]), len(classes)


def _arrays(path: Path, limit: int = SAMPLES) -> list[np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = [archive[name] for name in archive.files if name != LABELS or len(archive.files) == 1]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--data {path}: cannot be read as .npz ({reason}); wanted {WANTED}.") from error
    if not arrays:
        raise UsageError(f"--data {path}: holds no arrays; wanted {WANTED}.")
    for array in arrays:
        if array.dtype.kind not in "biuf" or array.ndim == 0 or not len(array):
            found = f"a {array.dtype} array of shape {list(array.shape)}"
            raise UsageError(f"--data {path}: holds {found}; wanted numbers, batch first.")
    return [array[:limit] for array in arrays]


def _images(folder: Path, preprocessing: Mapping[str, Any], paths: Sequence[Path] | None = None) -> np.ndarray:
    missing = [name for name in ("input_size", "mean", "std") if not preprocessing.get(name)]
    if missing:
        reason = f"nothing says the {', '.join(missing)} that the network's images have"
        raise UsageError(
            f"--data {folder}: {reason}; pass --mean, --std and --input-shape, or an .npz of arrays that are preprocessed."
        )
    if paths is None:
        paths = sorted(each for each in folder.rglob("*") if each.suffix.lower() in IMAGE_SUFFIXES)[:SAMPLES]
    if not paths:
        raise UsageError(f"--data {folder}: has no images ({', '.join(IMAGE_SUFFIXES[:4])}, …); wanted {WANTED}.")
    return np.stack([_image(each, preprocessing) for each in paths])


def _image(path: Path, preprocessing: Mapping[str, Any]) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("--data with images needs Pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            return as_input(image.convert(COLOR_ORDER.get(preprocessing["input_size"][0], "RGB")), preprocessing)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors for damaged files
        raise UsageError(f"--data {path}: cannot be read as an image ({error}).") from error


def as_input(image: Any, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """A picture as the network reads it, ``[C, H, W]`` float32, as timm's evaluation transform makes it.

    The shorter side goes to ``floor(size / crop_pct)``, the centre ``H×W`` is cut out, and ``(pixel/255 − mean) / std``
    is taken; of pixels from 0 to 255 where ``value_range`` says so.
    """
    from PIL import Image

    _, height, width = preprocessing["input_size"]
    scale = preprocessing.get("crop_pct") or 1.0
    wide, high = math.floor(width / scale), math.floor(height / scale)
    factor = max(wide / image.width, high / image.height)
    size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    if size != image.size:
        how = str(preprocessing.get("interpolation", "")).upper()
        image = image.resize(size, getattr(Image.Resampling, how, Image.Resampling.BILINEAR))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32).reshape(height, width, -1)
    pixels = pixels / (255.0 / tuple(preprocessing.get("value_range") or PIXELS)[1])
    mean, std = (np.asarray(preprocessing[name], dtype=np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))
