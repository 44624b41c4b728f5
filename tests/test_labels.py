"""Folders of images are numbered as the network's classes are."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldexport import labels
from foldexport.errors import UsageError

KNOWN = ("airplane", "automobile", "bird", "cat", "sports car, sport car", "car")


def numbered(folders, known=KNOWN):
    return labels.of_folders(Path("images"), folders, known)


def test_known_names_number_them_whatever_their_order():
    """Planted: folders whose alphabetical places, 0 and 1, are other classes."""
    found = numbered(["cat", "bird", "cat"])
    assert found.values.tolist() == [3, 2, 3] and found.classes == 6 and found.certain
    assert numbered(["Sport_Car", "sports car", "CAR"]).values.tolist() == [4, 4, 5]
    assert numbered(["1"], ("0", "2", "1")).values.tolist() == [2], "a name comes before a number"


def test_numbers_are_class_numbers():
    found = numbered(["10", "2", "003"], ())
    assert found.values.tolist() == [10, 2, 3] and found.classes == 11 and found.source == "numbers"
    assert numbered(["5", "0"]).values.tolist() == [5, 0]
    assert numbered(["1", "01"], ()).source == "order", "two folders of one number are names"


def test_without_names_the_order_counts_and_is_said_to():
    found = numbered(["dog", "cat"], ())
    assert found.values.tolist() == [1, 0] and found.source == "order" and not found.certain


@pytest.mark.parametrize("folders", [["cat", "dog", "zebra"], ["6"], ["n01440764"]], ids=["strange", "beyond", "synset"])
def test_strange_names_are_refused(folders):
    with pytest.raises(UsageError, match=r"none of the network's 6 classes \('airplane', .*--class-names"):
        numbered(folders)
