"""A notebook's cells run in order by plain Python, and what they show written into the file.

    python tools/notebook.py models/tour.ipynb            # run, and write the outputs
    python tools/notebook.py models/tour.ipynb --check    # run, and compare with the outputs in the file; exits 1 on a difference

Cells are plain Python, without the magics of IPython; the value of a last line is shown by its repr. A cell with the tag
``volatile`` keeps no outputs: what it shows is different each time. Numbers with a decimal point, versions among them, may
differ from machine to machine, so the comparison does not look at their digits.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"\d+\.\d[\w.+-]*|\d+e[-+]\d+")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    asked = parser.parse_args()
    path = asked.notebook.resolve()
    notebook = json.loads(path.read_text(encoding="utf-8"))
    os.chdir(path.parent)  # where a notebook's kernel starts
    sys.path.insert(0, "")
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):  # of the terminal that this was started from
        os.environ.pop(name, None)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    before = [text(cell["outputs"]) for cell in cells]
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells, 1):
        cell["execution_count"] = number
        shown = run("".join(cell["source"]), number, space)
        cell["outputs"] = [] if "volatile" in cell["metadata"].get("tags", ()) else shown
    if asked.check:
        return report([difference for was, cell in zip(before, cells) for difference in differences(was, text(cell["outputs"]))])
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def run(source: str, number: int, space: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of one cell, as a notebook holds them. Raises what the cell raises."""
    tree = ast.parse(source, f"cell {number}")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        exec(compile(tree, f"<cell {number}>", "exec"), space)
        value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), space) if last is not None else None
    outputs: list[dict[str, Any]] = []
    if stream.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines(stream.getvalue())})
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def lines(said: str) -> list[str]:
    """A text as a notebook holds it."""
    return said.splitlines(keepends=True)


def text(outputs: list[dict[str, Any]]) -> str:
    """What a reader sees of a cell's outputs."""
    return "\n".join("".join(each["text"] if "text" in each else each["data"]["text/plain"]).rstrip() for each in outputs)


def differences(before: str, after: str) -> Iterator[str]:
    was, now = (NUMBER.sub("0.0", said).splitlines() for said in (before, after))
    return (line for line in difflib.unified_diff(was, now, "in the file", "now", lineterm=""))


def report(found: list[str]) -> int:
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
