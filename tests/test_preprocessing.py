"""What is known of the inputs: said by the checkpoint or by the user, in the manifest, and as code in the card."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from foldexport import preprocessing, samples
from foldexport.bundle.recipe import recipe
from foldexport.errors import UsageError
from tests.command import foldexport, save_plain

Image = pytest.importorskip("PIL.Image", reason="pillow reads the images")
IMAGENET = {"input_size": (3, 24, 28), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.875,
            "interpolation": "bicubic"}  # fmt: skip
FIELDS = {
    "cropped": IMAGENET,
    "plain": {**IMAGENET, "crop_pct": None, "interpolation": "bilinear"},
    "unknown interpolation": {**IMAGENET, "interpolation": "random"},
    "raw": {**IMAGENET, "mean": (0.0,) * 3, "std": (1.0,) * 3, "value_range": (0.0, 255.0)},
    "raw to one": {**IMAGENET, "mean": (0.0,) * 3, "std": (1.0,) * 3, "value_range": (0.0, 1.0)},
    "grey": {"input_size": (1, 20, 20), "mean": (0.1307,), "std": (0.3081,), "interpolation": "nearest"},
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("size", [(40, 30), (28, 24), (17, 90)])
def test_the_card_s_recipe_is_what_the_network_was_fed(tmp_path, name, size):
    fields = FIELDS[name]
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    space: dict = {}
    exec(recipe(fields), space)
    found, (wanted,) = space["preprocess"](tmp_path / "a.png"), samples.load(tmp_path, fields)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, wanted)


def test_no_recipe_where_something_is_not_known():
    assert recipe({}) == "" and recipe({**IMAGENET, "mean": None}) == "" and recipe({**IMAGENET, "input_size": (4, 8, 8)}) == ""
    assert ".astype(np.float16)" in recipe(IMAGENET, "float16")


def test_what_goes_without_saying_is_said():
    found = preprocessing.described(IMAGENET)
    assert found["value_range"] == (0.0, 1.0) and found["color_order"] == "RGB" and found["layout"] == "NCHW"
    assert preprocessing.described(FIELDS["raw"])["value_range"] == (0.0, 255.0)
    assert preprocessing.described(FIELDS["grey"])["color_order"] == "L"
    assert preprocessing.described({}) == {} and preprocessing.described({"num_classes": 3}) == {"num_classes": 3}


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({"classes": ["cat", "dog"]}, ("cat", "dog")),
        ({"class_to_idx": {"dog": 1, "cat": 0}}, ("cat", "dog")),
        ({"names": {"0": "cat", "1": "dog"}}, ("cat", "dog")),
        ({"meta": {"CLASSES": ["cat", "dog"]}}, ("cat", "dog")),
        ({"pretrained_cfg": {"label_names": ["cat", "dog"]}}, ("cat", "dog")),
        ({"classes": 10}, ()),
        ({"classes": ["cat", 3]}, ()),
        ({"names": {"0": "cat", "7": "dog"}}, ()),
        ({}, ()),
    ],
)
def test_class_names_in_files(metadata, names):
    assert preprocessing.names_in(metadata) == names


def test_class_names_of_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat\r\ntiger cat \nÉcureuil\n\n".encode())
    assert preprocessing.read_names(path) == ("cat", "tiger cat", "Écureuil")
    for text, said in (("", "it is empty"), ("a\n\nb\n", "line 2 is empty")):
        path.write_text(text)
        with pytest.raises(UsageError, match=said):
            preprocessing.read_names(path)
    with pytest.raises(UsageError, match="cannot be read"):
        preprocessing.read_names(tmp_path / "none.txt")


def test_names_and_sizes_in_the_manifest(tmp_path):
    checkpoint, arch = save_plain(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {place}\n" for place in range(6)))
    words = [checkpoint, "--arch", arch, "--input-shape", "1x3x6x6", "--to", "ts", "--class-names", names]
    assert foldexport(*words, "--mean", "0.5,0.5,0.5").code == 0
    fields = json.loads((tmp_path / "net.manifest.json").read_text())["preprocessing"]
    assert fields["label_names"][5] == "class 5" and fields["mean"] == [0.5] * 3 and fields["input_size"] == [3, 6, 6]
    names.write_text("one\ntwo\n")
    result = foldexport(*words, "--overwrite")
    assert result.code == 2 and re.search(r"names.txt: has 2 names, the network 6 classes", result.message)


def test_names_beside_the_weights(tmp_path):
    checkpoint, arch = save_plain(tmp_path)
    state = torch.load(checkpoint)
    for names, kept in ((["a", "b", "c", "d", "e", "f"], True), (["a", "b"], False)):
        torch.save({"state_dict": state, "classes": names}, checkpoint)
        result = foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x6x6", "--to", "ts", "--json", "--overwrite")
        assert result.code == 0, result.err
        assert ("label_names" in result.document["preprocessing"]) == kept
        assert kept or any("left out the 2 class names" in note for note in result.document["architecture"]["notes"])
