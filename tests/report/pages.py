"""Reading a page back: a strict parser, and the small networks that pages are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from typing import Any

import torch
from torch import Tensor, nn

from foldexport import api, costs
from foldexport.manifest import describe
from foldexport.recognise import Network
from foldexport.report.html import document
from foldexport.study import Question, Study, evaluated_weights
from tests.statistics import randomise

VOID = frozenset({"meta", "br", "link", "img", "hr", "input", "path"})
HOSTILE = "<script>alert('1')</script>&amp;"  # a module's name, as it could stand in anybody's file


@dataclass
class Tag:
    """One element: its attributes, the text directly or indirectly inside of it, and where it stands."""

    name: str
    attributes: dict[str, str | None]
    parents: list[str]
    text: str = ""

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()


@dataclass
class Page:
    tags: list[Tag] = field(default_factory=list)

    def all(self, name: str) -> list[Tag]:
        return [tag for tag in self.tags if tag.name == name]

    def of_class(self, name: str) -> list[Tag]:
        return [tag for tag in self.tags if name in tag.classes]

    @property
    def text(self) -> str:
        return next(tag for tag in self.tags if tag.name == "body").text


class _Reader(HTMLParser):
    """Fails on tags that do not close, or close out of order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page, self._open = Page(), []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        made = Tag(tag, dict(attrs), [each.name for each in self._open])
        self.page.tags.append(made)
        if tag not in VOID:
            self._open.append(made)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.page.tags.append(Tag(tag, dict(attrs), [each.name for each in self._open]))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1].name == tag, f"</{tag}> where {[each.name for each in self._open]} are open"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for each in self._open:
            each.text += data

    def finished(self) -> Page:
        self.close()
        assert not self._open, [each.name for each in self._open]
        return self.page


def read(text: str) -> Page:
    """The elements of a page. Raises AssertionError where its tags do not nest."""
    reader = _Reader()
    reader.feed(text)
    return reader.finished()


class Gated(nn.Module):
    """Folds, keeps (a gate; a batch norm in front of zero padding), skips, merges, and has a hostile name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.add_module(HOSTILE, nn.Conv2d(3, 8, 3, padding=1, bias=False))
        self.bn = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.gate = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(getattr(self, HOSTILE)(self.first(x))))
        x = self.blocks(x)
        x = x * torch.sigmoid(self.gate(x))
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def study(module: nn.Module, example: Tensor, chain: bool = False) -> Study:
    """What the commands know of a network after its proof."""
    folded = api.fold(module, example, chain=chain)
    before = costs.of_graph(folded.graph, module, folded.counts_before)
    after = costs.of_module(folded.module, folded.graph.example, folded.counts_after)
    source = {"file": f"{HOSTILE}.pth", "sha256": "0" * 64, "size_bytes": 1, "format": "torch zip", "taken": "", "prefix": "",
              "ema": False, "tensors": len(module.state_dict())}  # fmt: skip
    network = Network(module, "net", f"net {HOSTILE}, of a test", f"--arch {HOSTILE}", source=source)
    return Study(
        network, folded.module, folded.graph, (example,), None, before, after, folded.ledger, folded.certificate,
        evaluated_weights(folded.graph), {}, folded.extremes, folded.refold,
    )  # fmt: skip


def facts(found: Study, **more: Any) -> dict[str, Any]:
    """The document of a page about it."""
    from pathlib import Path

    record = describe(Question(Path("net.pth")), found) | {"inputs": [], "outputs": []}
    return document.of_study(found, record, command=["foldexport", "inspect", f"{HOSTILE}.pth"], **more)


@cache
def gated() -> Study:
    torch.manual_seed(0)
    return study(randomise(Gated(), 0), torch.randn(1, 3, 16, 16))


@cache
def gated_facts() -> dict[str, Any]:
    return facts(gated())
