"""The training recipe in models/: its data layouts, its augmentation, an interrupted run that ends as a whole one."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from foldexport import checkpoint, zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))
import data as recipe_data
import train as recipe

CLASSES = ("ant", "bee")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 12, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, images):
    root = tmp_path_factory.mktemp("folders")
    for split in ("train", "test"):
        for name, pictures in zip(CLASSES, images, strict=True):
            (root / split / name).mkdir(parents=True)
            for i, picture in enumerate(pictures):
                Image.fromarray(picture).save(root / split / name / f"{i:04}.png")
    return root


def test_folders_and_zips_read_alike(folders, images, tmp_path):
    for split in ("train", "test"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for file in (folders / split).rglob("*.png"):
                archive.write(file, file.relative_to(folders))
            archive.writestr(f"{split}/README.txt", "no image")
    for root in (folders, tmp_path):
        found = recipe_data.load_split(root, "train", 32)
        assert found.classes == CLASSES
        assert found.labels.tolist() == [0] * 12 + [1] * 12
        assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), images.reshape(-1, 32, 32, 3))


def python2_batch(rows: np.ndarray, labels: list[int]) -> bytes:
    """A CIFAR-10 batch as Python 2 pickled it: 8-bit strings, which Python 3 no longer writes."""
    count = bytes([len(rows)])
    raw = rows.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01(K" + count + b"M\x00\x0ct" + kind + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + state + b"U\x06labels" + numbers + b"u."


@pytest.mark.parametrize("around", [True, False])
@pytest.mark.parametrize("writer", ["python 2", "python 3"])
def test_cifar10_pickles_are_read(tmp_path, images, around, writer):
    folder = tmp_path / "cifar-10-batches-py" if around else tmp_path
    folder.mkdir(exist_ok=True)
    rows = images[0].transpose(0, 3, 1, 2).reshape(12, 3072)
    labels = [i % 10 for i in range(12)]
    by_python3 = pickle.dumps({b"data": rows, b"labels": labels}, 2)
    written = python2_batch(rows, labels) if writer == "python 2" else by_python3
    for name in ["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]:
        (folder / name).write_bytes(written)
    found = recipe_data.load_split(tmp_path, "train", 32)
    assert found.images.shape == (60, 3, 32, 32)
    assert np.array_equal(found.images[:12].permute(0, 2, 3, 1).numpy(), images[0])
    assert found.labels.tolist() == labels * 5
    assert found.classes[3] == "cat"
    assert len(recipe_data.load_split(tmp_path, "test", 32).labels) == 12


def test_code_in_a_cifar10_pickle_does_not_run(tmp_path):
    class Acts:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Acts(), b"labels": []}))
    with pytest.raises(pickle.UnpicklingError, match="refused: .*mkdir"):
        recipe_data.load_split(tmp_path, "test", 32)
    assert not (tmp_path / "ran").exists()


def test_data_that_cannot_be_used_is_named(folders, tmp_path):
    with pytest.raises(SystemExit, match="0000.png is 32x32; this model trains on 64x64"):
        recipe_data.load_split(folders, "train", 64)
    with pytest.raises(SystemExit, match="wanted cifar-10-batches-py, train.zip or"):
        recipe_data.load_split(tmp_path, "train", 32)
    (tmp_path / "train").mkdir()
    with pytest.raises(SystemExit, match="no image"):
        recipe_data.load_split(tmp_path, "train", 32)


def test_crop_and_flip_are_reflect_padding_a_window_and_a_mirror():
    pictures = torch.randint(0, 256, (64, 3, 8, 10), dtype=torch.uint8)
    found = recipe_data.crop_and_flip(pictures, 3, torch.Generator().manual_seed(1))
    assert found.dtype == torch.uint8
    padded = F.pad(pictures.float(), (3, 3, 3, 3), mode="reflect").to(torch.uint8)
    seen = set()
    for image, result in zip(padded, found, strict=True):
        windows = {(y, x, flip): image[:, y : y + 8, x : x + 10] for y in range(7) for x in range(7) for flip in (0, 1)}
        hits = [place for place, w in windows.items() if torch.equal(w.flip(2) if place[2] else w, result)]
        assert len(hits) == 1
        seen.add(hits[0])
    assert {flip for _, _, flip in seen} == {0, 1}
    assert len(seen) > 30


def test_normalize_takes_bytes_to_unit_variance():
    pixels = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    found = recipe_data.normalize(pixels, (0.5, 0.0, 1.0), (0.5, 2.0, 1.0))
    assert found.flatten().tolist() == [1.0, 0.5, 0.0]


def test_training_batches_are_full_shuffled_and_repeatable(folders):
    split = recipe_data.load_split(folders, "train", 32)
    runs = [list(recipe_data.batches(split, 5, torch.Generator().manual_seed(3))) for _ in range(2)]
    assert [len(labels) for _, labels in runs[0]] == [5] * 4
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(*runs, strict=True))
    assert torch.cat([labels for _, labels in recipe_data.batches(split, 5)]).equal(split.labels)


def test_learning_rate_rises_for_an_epoch_and_falls_to_zero():
    rates = [recipe.learning_rate(step, 10, 5, 0.2) for step in range(50)]
    assert rates[9] == pytest.approx(0.2)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[30] == pytest.approx(0.1)
    assert 0 < rates[-1] < 0.001


def command(folders, out, *more):
    small = ["--arch-arg", "depth=10", "--arch-arg", "width=0.25", "--epochs", "3", "--batch-size", "8", "--seed", "5"]
    return ["--data", str(folders), "--out", str(out), *small, *more]


def test_weight_decay_is_on_weights_only(folders):
    args = recipe.parse_args(command(folders, "x.pth"))
    model = recipe.MODELS["diracnet"].build(depth=10, width=0.25, num_classes=2)
    decayed, others = recipe.make_optimizer(model, args).param_groups
    assert decayed["weight_decay"] == 5e-4 and others["weight_decay"] == 0
    assert {parameter.dim() for parameter in decayed["params"]} == {2, 4}
    assert {parameter.dim() for parameter in others["params"]} == {1}


def test_an_interrupted_run_ends_as_a_whole_one(folders, tmp_path, monkeypatch):
    recipe.main(command(folders, tmp_path / "whole.pth"))

    class Interrupted(recipe.Trainer):
        def train_epoch(self, epoch):
            if epoch == 1:
                raise KeyboardInterrupt
            return super().train_epoch(epoch)

    with monkeypatch.context() as patched:
        patched.setattr(recipe, "Trainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(command(folders, tmp_path / "halves.pth"))
    assert not (tmp_path / "halves.pth").exists()
    recipe.main(command(folders, tmp_path / "halves.pth", "--resume"))
    assert len((tmp_path / "halves.run" / "log.jsonl").read_text().splitlines()) == 3
    whole, halves = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("whole", "halves"))
    assert list(whole) == ["params", "stats"]
    for layer in whole:
        assert whole[layer].keys() == halves[layer].keys()
        assert all(torch.equal(tensor, halves[layer][key]) for key, tensor in whole[layer].items())


def test_what_is_saved_is_a_published_checkpoint(folders, tmp_path):
    recipe.main(command(folders, tmp_path / "net.pth"))
    read = checkpoint.read(tmp_path / "net.pth")
    found = zoo.identify(read.tensors, read.metadata)
    assert found.description == "DiracNet v2, CIFAR, depth 10, width 0.25, 2 classes, unfolded"
    assert found.notes == []


def test_resume_without_a_state_says_so(folders, tmp_path):
    with pytest.raises(SystemExit, match="start without it"):
        recipe.main(command(folders, tmp_path / "x.pth", "--resume"))


def test_the_archives_beside_the_checkout(shared):
    with zipfile.ZipFile(shared / "data" / "cifar10" / "test.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        picture = Image.open(io.BytesIO(archive.read(names[0])))
    assert (len(names), picture.size, picture.mode) == (10_000, (32, 32), "RGB")
