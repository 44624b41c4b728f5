"""What is said of inputs in --data that the network does not take."""

from __future__ import annotations

import numpy as np
import pytest

from tests.command import foldexport, save_plain


@pytest.fixture
def said(tmp_path):
    """The message for an array in the place of --data, with or without --input-shape."""

    def message(array: np.ndarray, *options: str) -> str:
        checkpoint, arch = save_plain(tmp_path)
        np.savez(tmp_path / "given.npz", x=array)
        result = foldexport(checkpoint, "--arch", arch, "--to", "ts", "--data", tmp_path / "given.npz", *options)
        assert result.code == 2, result.err
        return result.message

    return message


@pytest.mark.parametrize("options", [(), ("--input-shape", "1x3x8x8"), ("--no-fold",)], ids=["data", "shape", "unfolded"])
def test_bytes_for_a_network_of_floats_are_named_by_their_file(said, options):
    assert "given.npz is uint8; the network takes float32: save it as float32" in said(np.zeros((2, 3, 8, 8), np.uint8), *options)


def test_another_number_of_channels_is_said_as_that(said):
    grey = np.zeros((2, 1, 8, 8), np.float32)
    assert "rejects input shape 1x1x8x8: it takes 3 channels, this input has 1" in said(grey)
    text = said(grey, "--input-shape", "1x3x8x8")
    assert "the network takes images of 3 channels, these have 1" in text and "--input-shape" not in text


def test_other_sizes_are_still_settled_by_the_shape(said):
    assert "samples are 3x9x9, the network's input is 3x8x8; pass --input-shape" in said(
        np.zeros((2, 3, 9, 9), np.float32), "--input-shape", "1x3x8x8"
    )


def test_a_folder_asks_for_what_was_not_given_only(tmp_path):
    checkpoint, arch = save_plain(tmp_path)
    (tmp_path / "images").mkdir()
    words = (checkpoint, "--arch", arch, "--to", "ts", "--data", tmp_path / "images")
    given = foldexport(*words, "--input-shape", "1x3x8x8")
    assert given.code == 2 and "pass --mean and --std, or" in given.message and "--input-shape" not in given.message
    assert "pass --input-shape, --mean and --std, or" in foldexport(*words).message
    assert "has no images" in foldexport(*words, "--input-shape", "1x3x8x8", "--mean", "0,0,0", "--std", "1,1,1").message
