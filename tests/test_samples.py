"""The user's own inputs: arrays as they are, images as the network's preprocessing makes them."""

from __future__ import annotations

import numpy as np
import pytest

from foldexport import samples
from foldexport.errors import UsageError

Image = pytest.importorskip("PIL.Image", reason="pillow reads the images")
CONFIG = {"input_size": (3, 8, 8), "mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0), "crop_pct": 1.0}


def test_an_image_of_the_right_size_is_only_normalised():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    found = samples.as_input(Image.fromarray(pixels), CONFIG)
    wanted = (pixels / 255.0 - np.array(CONFIG["mean"])) / np.array(CONFIG["std"])
    assert found.dtype == np.float32 and found.shape == (3, 8, 8)
    np.testing.assert_allclose(found, wanted.transpose(2, 0, 1), atol=1e-6)


def test_the_centre_is_cut_out_of_a_wide_image():
    pixels = np.zeros((8, 20, 3), np.uint8)
    pixels[:, 6:14, 0] = 255
    found = samples.as_input(Image.fromarray(pixels), CONFIG)
    assert (found[0] == 1).all() and (found[1] == -1).all() and (found[2] == 0).all()


def test_crop_pct_leaves_a_margin():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:24, 8:24] = 255  # the inner half, which fills 8 of the 16 pixels that the image is resized to
    found = samples.as_input(Image.fromarray(pixels), {**CONFIG, "crop_pct": 0.5, "interpolation": "nearest"})
    assert (found[0] == 1).all()


def test_a_folder_of_images_is_read_in_order(tmp_path):
    for place in (2, 0, 1):
        Image.fromarray(np.full((8, 8, 3), 100 * place, np.uint8)).save(tmp_path / f"{place}.png")
    (tmp_path / "notes.txt").write_text("no image")
    (found,) = samples.load(tmp_path, CONFIG)
    assert found.shape == (3, 3, 8, 8) and found[0, 2, 0, 0] < found[1, 2, 0, 0] < found[2, 2, 0, 0]


def test_a_damaged_image_and_unknown_preprocessing_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    with pytest.raises(UsageError, match="a.png: cannot be read as an image"):
        samples.load(tmp_path, CONFIG)
    with pytest.raises(UsageError, match="mean, std"):
        samples.load(tmp_path, {"input_size": (3, 8, 8)})


def test_arrays(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((100, 2), np.float32), b=np.ones((3, 5), np.int64))
    first, second = samples.load(tmp_path / "x.npz", {})
    assert first.shape == (samples.SAMPLES, 2) and second.dtype == np.int64
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "scalar.npz", x=np.float32(3))
    for name, words in (("none", "no arrays"), ("scalar", "batch first")):
        with pytest.raises(UsageError, match=words):
            samples.load(tmp_path / f"{name}.npz", {})
