"""The notebook: its cells run in order, show what the file says that they show, and nothing of the machine is in it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.versions import PRINTS

ROOT = Path(__file__).parent.parent
TOUR = ROOT / "models" / "tour.ipynb"
LARGEST_BYTES = 200_000
NOTEBOOK = json.loads(TOUR.read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def tool(path: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, ROOT / "tools" / "notebook.py", path, "--check"]
    return subprocess.run(words, capture_output=True, text=True, timeout=600)


@PRINTS
def test_the_cells_run_and_show_what_the_file_has():
    done = tool(TOUR)
    assert done.returncode == 0, f"run tools/notebook.py {TOUR.name} where this is meant:\n{done.stdout}{done.stderr[-2000:]}"


@pytest.mark.parametrize(
    ("source", "said"),
    [("1 + 1", "+2"), ("raise ValueError('planted')", "planted"), ("2 + 0.5", "")],
    ids=["another output", "an error", "another number"],
)
def test_the_check_sees_a_change_of_words_and_an_error(tmp_path, source, said):
    shown = {"data": {"text/plain": ["3.5"]}, "execution_count": 1, "metadata": {}, "output_type": "execute_result"}
    cell = {"cell_type": "code", "execution_count": 1, "id": "a", "metadata": {}, "outputs": [shown], "source": [source]}
    (tmp_path / "a.ipynb").write_text(json.dumps({**NOTEBOOK, "cells": [cell]}))
    done = tool(tmp_path / "a.ipynb")
    assert done.returncode == (1 if said else 0) and said in done.stdout + done.stderr


def test_cells_are_plain_python_with_what_they_show():
    for cell in CODE:
        ast.parse("".join(cell["source"]))
        volatile = "volatile" in cell["metadata"].get("tags", ())
        assert cell["execution_count"] and (volatile or cell["outputs"]) and not (volatile and cell["outputs"])
    assert all(len(line.rstrip("\n")) <= 132 for cell in NOTEBOOK["cells"] for line in cell["source"])


def test_it_is_a_notebook_small_and_of_no_machine():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    text = TOUR.read_text(encoding="utf-8")
    assert TOUR.stat().st_size <= LARGEST_BYTES
    assert not re.search(r"/tmp/|/home/|/Users/|/root/|/work/|20\d\d-\d\d|\bTraceback\b", text)


def test_every_link_leads_to_a_file():
    for cell in NOTEBOOK["cells"]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", "".join(cell["source"])) if cell["cell_type"] == "markdown" else ():
            assert (TOUR.parent / target).is_file(), target
