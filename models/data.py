"""Image classification data held in memory as uint8, read from three layouts, augmented in batches.

A data path is one of
- torchvision's CIFAR-10 folder (``cifar-10-batches-py`` or the folder around it),
- image folders ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``,
- ``train.zip`` and ``test.zip`` of such folders.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm")
CIFAR10_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass
class Split:
    """``images`` uint8 ``[N, 3, H, W]``, ``labels`` int64 ``[N]``, the classes in label order."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers and numpy arrays; any other global in the file is refused, not imported."""

    def find_class(self, module: str, name: str):
        allowed = {
            ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1_bytes,
        }
        found = allowed.get((module.removeprefix("numpy.core.").removeprefix("numpy._core."), name))
        if found is None:
            raise pickle.UnpicklingError(f"refused: {module}.{name} is no part of a CIFAR-10 batch")
        return found


def _latin1_bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _read_cifar10(folder: Path, split: str) -> Split:
    images, labels = [], []
    for name in CIFAR10_FILES[split]:
        with open(folder / name, "rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        images.append(torch.from_numpy(np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32)))
        labels += batch["labels"]
    return Split(torch.cat(images), torch.tensor(labels), CIFAR10_CLASSES)


def _decode(name: str, data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        if image.size != (size, size):
            raise SystemExit(f"{name} is {image.size[0]}x{image.size[1]}; this model trains on {size}x{size} images")
        return np.asarray(image.convert("RGB"))


def _read_images(names: list[str], read: Callable[[str], bytes], size: int, title: str) -> Split:
    """``names`` end in ``<class>/<file>``; classes are numbered alphabetically, as torchvision's ImageFolder does."""
    names = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
    classes = sorted({PurePosixPath(name).parent.name for name in names})
    if not names:
        raise SystemExit(f"{title}: no image <class>/<file>.jpg in it")
    images = torch.empty(len(names), 3, size, size, dtype=torch.uint8)
    for i, name in enumerate(tqdm(names, desc=f"read {title}", leave=False, disable=None)):
        images[i] = torch.tensor(_decode(name, read(name), size)).permute(2, 0, 1)
    labels = torch.tensor([classes.index(PurePosixPath(name).parent.name) for name in names])
    return Split(images, labels, tuple(classes))


def load_split(path: str | Path, split: str, size: int) -> Split:
    """``split`` ("train" or "test") of the data at ``path``, every image ``size`` by ``size`` pixels."""
    path = Path(path)
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / "test_batch").is_file():
            return _read_cifar10(folder, split)
    archive = path / f"{split}.zip"
    if archive.is_file():
        with zipfile.ZipFile(archive) as opened:
            return _read_images(opened.namelist(), opened.read, size, archive.name)
    folder = path / split
    if folder.is_dir():
        names = [file.relative_to(folder).as_posix() for file in folder.glob("*/*")]
        return _read_images(names, lambda name: (folder / name).read_bytes(), size, str(folder))
    raise SystemExit(f"{path}: wanted cifar-10-batches-py, {split}.zip or {split}/<class>/*.jpg in it")


def _reflect(index: Tensor, length: int) -> Tensor:
    """Indices outside ``0 … length-1`` mirrored at the border pixel, as ``reflect`` padding does."""
    return (length - 1) - ((length - 1) - index.abs()).abs()


def crop_and_flip(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Each image of ``[N, C, H, W]`` shifted by up to ``pad`` pixels (reflected border) and mirrored at random."""
    count, channels, height, width = images.shape
    shift = torch.randint(-pad, pad + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = _reflect(torch.arange(height) + shift[0], height)
    columns = _reflect(torch.arange(width) + shift[1], width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    which, channel = torch.arange(count), torch.arange(channels)
    return images[which[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(x/255 - mean) / std`` per channel of uint8 ``[N, C, H, W]``, as float32."""
    per_channel = (-1, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(per_channel)) / torch.tensor(std).view(per_channel)


def batches(
    split: Split, batch_size: int, generator: torch.Generator | None = None, pad: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 images and labels: all of them in order, or with a ``generator`` shuffled, augmented, full batches only."""
    if generator is None:
        for start in range(0, len(split.labels), batch_size):
            yield split.images[start : start + batch_size], split.labels[start : start + batch_size]
        return
    order = torch.randperm(len(split.labels), generator=generator)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield crop_and_flip(split.images[chosen], pad, generator), split.labels[chosen]
