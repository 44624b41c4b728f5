"""The user's own inputs for the proofs, from ``--data``: an ``.npz`` of arrays or a folder of images."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foldexport import labels as naming
from foldexport.errors import MissingDependencyError, UsageError
from foldexport.labels import Labels
from foldexport.preprocessing import COLOR_ORDER, PIXELS

SAMPLES = 64  # evenly from all of them
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


def labelled(path: Path, preprocessing: Mapping[str, Any], limit: int) -> tuple[list[np.ndarray], Labels]:
    """Many samples, for calibration and accuracy: one array per input, and their class numbers, if any.

    A folder of images has labels where every image lies in one of its own folders; these are the classes, by the network's
    ``label_names`` where it has any, else in the order of their names (see foldexport.labels). An .npz has them in its array
    "labels". Samples are taken evenly from all of them. Raises what :func:`load` raises, and UsageError for folders that are none
    of the network's classes.
    """
    if not path.is_dir():
        load(path, preprocessing)  # refuses what is no .npz
        arrays, found = _arrays(path, limit), naming.NONE
        with np.load(path, allow_pickle=False) as archive:
            whole = LABELS in archive.files and len(archive.files) > 1
            values = archive[LABELS] if whole else None
            counts = {len(archive[name]) for name in archive.files if name != LABELS}
        if values is None:
            return arrays, found
        if values.ndim != 1 or values.dtype.kind not in "iu" or counts != {len(values)}:
            said = f"{values.dtype} {list(values.shape)} for {', '.join(map(str, sorted(counts)))} samples"
            raise UsageError(f"--data {path}: its labels are {said}; wanted one class number per sample.")
        require_classes(f"--data {path}: its labels", values)
        return arrays, Labels(spread(values, limit).astype(np.int64), int(values.max()) + 1, "array")
    paths = _paths(path)
    inside = bool(paths) and all(each.parent.parent == path for each in paths)
    taken = spread(paths, limit)
    folders = [each.parent.name for each in paths]  # all of them: a class that is not taken is one too
    found = naming.of_folders(path, folders, preprocessing.get("label_names") or ()) if inside else naming.NONE
    images = [_images(path, preprocessing, taken)]
    return images, found._replace(values=None if found.values is None else spread(found.values, limit))


def spread(values: Any, limit: int) -> Any:
    """At most ``limit`` of an array or a list, evenly from all of it: what lies sorted by class keeps all of its classes."""
    count = len(values)
    if count <= limit:
        return values
    places = [place * count // limit for place in range(limit)]
    return values[places] if isinstance(values, np.ndarray) else [values[place] for place in places]


def require_finite(what: str, array: np.ndarray) -> None:
    """Raise UsageError for an array of samples that holds NaN or infinity, or what float32 does not hold."""
    if array.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):
        wrong = ~np.isfinite(array.astype(np.float32, copy=False))
    if wrong.any():
        where = ", ".join(str(int(each)) for each in np.argwhere(wrong)[0])
        count = int(wrong.sum())
        said = "1 value that is" if count == 1 else f"{count} values that are"
        raise UsageError(f"{what} has {said} not finite in float32, the first at index ({where}).")


def require_classes(what: str, values: np.ndarray) -> None:
    """Raise UsageError for class numbers below 0."""
    if len(values) and int(values.min()) < 0:
        raise UsageError(f"{what} hold {int(values.min())}; wanted class numbers from 0.")


def _arrays(path: Path, limit: int = SAMPLES) -> list[np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name != LABELS or len(archive.files) == 1}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--data {path}: cannot be read as .npz ({reason}); wanted {WANTED}.") from error
    if not arrays:
        raise UsageError(f"--data {path}: holds no arrays; wanted {WANTED}.")
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or array.ndim == 0 or not len(array):
            found = f"a {array.dtype} array of shape {list(array.shape)}"
            raise UsageError(f"--data {path}: holds {found}; wanted numbers, batch first.")
        require_finite(f"--data {path}: input {name!r}", array)
    return [spread(array, limit) for array in arrays.values()]


def _paths(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.suffix.lower() in IMAGE_SUFFIXES)


def _images(folder: Path, preprocessing: Mapping[str, Any], paths: Sequence[Path] | None = None) -> np.ndarray:
    missing = [name for name in ("input_size", "mean", "std") if not preprocessing.get(name)]
    if missing:
        reason = f"nothing says the {', '.join(missing)} that the network's images have"
        wanted = ", ".join({"input_size": "--input-shape"}.get(name, f"--{name}") for name in missing)
        wanted = " and ".join(wanted.rsplit(", ", 1))
        raise UsageError(f"--data {folder}: {reason}; pass {wanted}, or an .npz of arrays that are preprocessed.")
    if paths is None:
        paths = spread(_paths(folder), SAMPLES)
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
