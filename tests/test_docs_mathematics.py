"""The pages on mathematics: every Python block holds, would not with a wrong sign, and every link leads somewhere."""

from __future__ import annotations

import ast
import copy
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("mathematics.md", "mathematics-convolutions.md", "mathematics-proof.md")
MAX_LINES = 10
SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
TEXT = {page: (DOCS / page).read_text(encoding="utf-8") for page in PAGES}


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(id, source) of the Python blocks of a page; the id is the heading above it."""
    heading, seen = "", Counter()
    for found in re.finditer(r"^#+ (?P<heading>[^\n]+)$|^```python\n(?P<code>.*?)^```$", TEXT[page], re.MULTILINE | re.DOTALL):
        if found["code"] is None:
            heading = slug(found["heading"])
            continue
        seen[heading] += 1
        yield f"{page}:{heading}" + (f"-{seen[heading]}" if seen[heading] > 1 else ""), found["code"]


BLOCKS = {name: code for page in PAGES for name, code in blocks(page)}


def run(code: str | ast.Module) -> None:
    """Execute a block as a reader would, in a namespace of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(code, "<block>", "exec"), {"__name__": "block"})


def slips(code: str) -> Iterator[ast.Module]:
    """The block with one operator swapped, ``+`` and ``−`` or ``·`` and ``/``, for every operator in turn."""
    tree = ast.parse(code)
    places = [place for place, node in enumerate(ast.walk(tree)) if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED]
    for place in places:
        wrong = copy.deepcopy(tree)
        node = list(ast.walk(wrong))[place]
        node.op = SWAPPED[type(node.op)]()
        yield wrong


@pytest.mark.parametrize("name", BLOCKS)
def test_block_holds(name: str) -> None:
    run(BLOCKS[name])


@pytest.mark.parametrize("name", BLOCKS)
def test_block_would_notice_a_slip(name: str) -> None:
    noticed = 0
    for wrong in slips(BLOCKS[name]):
        try:
            run(wrong)
        except AssertionError:
            noticed += 1
        except Exception:  # a slip in a size does not run at all, and shows nothing
            continue
    assert noticed, "no swapped sign makes it fail: it does not check the equation"


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_short_and_needs_torch_alone(name: str) -> None:
    lines = [line for line in BLOCKS[name].splitlines() if line.strip()]
    assert len(lines) <= MAX_LINES
    assert "assert " in BLOCKS[name]
    modules = []
    for node in ast.walk(ast.parse(BLOCKS[name])):
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
    assert {module.split(".")[0] for module in modules} == {"torch"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    without_code = re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = DOCS / path if path else DOCS / page
        anchors = {slug(heading) for heading in re.findall(r"^#+ (.+)$", TEXT.get(file.name, ""), re.MULTILINE)}
        if not file.resolve().exists() or (anchor and anchor not in anchors):
            broken.append(target)
    assert not broken


def test_there_are_blocks_for_at_least_ten_rules() -> None:
    assert len(BLOCKS) >= 10
