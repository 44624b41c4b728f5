"""What libraries print is kept off the screen, also from C and from other processes, and is at hand for an error."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest

from foldexport.exporters.silence import silenced


def test_python_and_descriptors_and_children_are_silent(capfd, recwarn):
    print("before")
    with silenced() as said:
        print("from python")
        os.write(1, b"from C on stdout\n")
        os.write(2, b"from C on stderr\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("loud").critical("a log")
    print("after")
    assert capfd.readouterr() == ("before\nafter\n", "") and not list(recwarn)
    assert all(f"from {who}" in said.text for who in ("python", "C on stdout", "C on stderr", "a child"))
    assert logging.root.manager.disable == 0


def test_everything_is_as_before_when_the_block_raises(capfd):
    with pytest.raises(KeyError), silenced() as said:
        os.write(2, b"the cause\n")
        raise KeyError
    os.write(1, b"visible\n")
    print("visible too", file=sys.stderr)
    assert capfd.readouterr() == ("visible\n", "visible too\n")
    assert said.reason() == "the cause" and said.reason(ValueError("first line\nsecond")) == "first line"
    assert said.reason(ValueError()) == "the cause"


def test_silence_within_silence(capfd):
    with silenced() as outer:
        os.write(1, b"one\n")
        with silenced() as inner:
            os.write(1, b"two\n")
        os.write(1, b"three\n")
    assert inner.text == "two\n" and outer.text == "one\nthree\n" and capfd.readouterr() == ("", "")


def test_closed_descriptors_are_left_closed():
    """As a service without a terminal has them."""
    code = "import os; os.close(1); os.close(2)\nfrom foldexport.exporters.silence import silenced\nwith silenced(): print('x')\n"
    code += "try:\n    os.fstat(1)\nexcept OSError:\n    os._exit(7)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7
