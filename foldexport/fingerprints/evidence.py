"""What a file says about the name of its network: in itself, in its own checksum, beside it, and in what it is called.

In the order of their authority: the SHA-256 of a published file; an architecture named in the file; in ``config.json``
beside it, as downloaded model repositories have it; the file's name and those of its folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foldexport.checkpoint import Checkpoint
from foldexport.fingerprints.table import Candidate, Table

# Where training scripts put the name: at the top of the checkpoint, or among their options.
ARCHITECTURE_KEYS = ("architecture", "arch")
NAME_KEYS = (*ARCHITECTURE_KEYS, "model_name", "model", "network")
OPTION_KEYS = ("pretrained_cfg", "args", "hyper_parameters", "hparams", "config", "cfg", "opt")

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Claim:
    """``said``: what says it, for the reason ("the file's `arch` is resnetaa50"). ``tag``: of the weights, if it is named.

    ``arguments``: those that the named weights need. ``package``: the one that published them, where that is known.
    ``sure``: whether the name was looked up and not found in passing, so that one of another network contradicts the shapes.
    """

    name: str
    said: str
    tag: str = ""
    package: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sure: bool = True

    def fits(self, candidate: Candidate) -> bool:
        return candidate.name == self.name and self.arguments.items() <= candidate.arguments.items()


def claims(read: Checkpoint, names: Collection[str], table: Table) -> Iterator[Claim]:
    """What is said, the most reliable first. ``names``: those of the candidates, looked for in the names of file and folders."""
    if (published := table.files.get(read.sha256[:8])) is not None:
        arguments = next(
            (each.arguments for each in table.published[published.package][published.name] if each.tag == published.tag), {}
        )
        said = f"its SHA-256 is that of the published {published.name} {published.tag}".rstrip()
        yield Claim(published.name, said, published.tag, published.package, arguments)
    for key, text in _named(read.metadata):
        if (claim := _claim(text, f"the file's `{key}` is {text}", table)) is not None:
            yield claim
    if (config := _config_beside(read.path)) is not None:
        if (claim := _claim(config["architecture"], f"config.json beside it says {config['architecture']}", table)) is not None:
            inner = config.get("pretrained_cfg")
            tag = inner.get("tag") if isinstance(inner, Mapping) else None
            yield Claim(claim.name, claim.said, claim.tag or (tag if isinstance(tag, str) else ""))
    yield from _in_names(read.path, names, table)


def unknown_names(read: Checkpoint, table: Table) -> list[str]:
    """What the file calls its architecture, where that is no network of the table: it may be one that only looks like one."""
    named = ((key, read.metadata.get(key)) for key in ARCHITECTURE_KEYS)
    return [f"the file's `{key}` is {text}" for key, text in named if isinstance(text, str) and not _claim(text, "", table)]


def stated_inputs(read: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """A ``pretrained_cfg`` that says how images are taken, and where it was found; empty where there is none."""
    if isinstance(found := read.metadata.get("pretrained_cfg"), Mapping):
        return found, "the file's pretrained_cfg"
    config = _config_beside(read.path) or {}
    found = config.get("pretrained_cfg")
    return (found, "pretrained_cfg in config.json beside it") if isinstance(found, Mapping) else ({}, "")


def _named(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, text) wherever a name of a network is expected."""
    for key in NAME_KEYS:
        if isinstance(text := metadata.get(key), str):
            yield key, text
    for outer in OPTION_KEYS:
        inner = metadata.get(outer)
        for key in NAME_KEYS if isinstance(inner, Mapping) else ():
            if isinstance(text := inner.get(key), str):
                yield f"{outer}.{key}", text


def _claim(text: str, said: str, table: Table) -> Claim | None:
    """``hf-hub:timm/resnet50.a1_in1k`` → resnet50 with tag a1_in1k; None for what is no known network."""
    name, _, tag = text.strip().rpartition("/")[2].rpartition(":")[2].partition(".")
    name = name if table.known_name(name) else name.lower().replace("-", "_")
    if not table.known_name(name):
        return None
    today, usual = table.former_names.get(name, (name, ""))
    return Claim(today, said, tag or usual)


def _config_beside(path: Path) -> dict[str, Any] | None:
    """``config.json`` of a model repository that names one ``architecture``, as timm writes it."""
    file = path.parent / "config.json"
    try:
        if not file.is_file() or file.stat().st_size > MAX_CONFIG_BYTES:
            return None
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):  # not ours, or not JSON: it says nothing
        return None
    return found if isinstance(found, dict) and isinstance(found.get("architecture"), str) else None


def _in_names(path: Path, names: Collection[str], table: Table) -> Iterator[Claim]:
    """Candidates' names in the file's name, in that of a model repository above it, and in the folder's.

    ``resnet50_a1_0-14fe96d1.pth`` holds resnet50, ``models--timm--resnetaa50.a1h_in1k/snapshots/…`` holds resnetaa50.
    """
    former = {old: today for old, today in table.former_names.items() if today[0] in names}
    known = {name: (name, "") for name in names} | former
    folders = path.resolve().parts[:-1]
    repositories = [each for each in folders if each.startswith("models--")]
    places = [("its file name holds", path.name), *(("its folder's name holds", each) for each in [*repositories, *folders[-1:]])]
    for what, text in places:
        for name, rest in _held(text, known):
            today, tag = known[name]
            tags = {each.tag for networks in table.published.values() for each in networks.get(today, ())}
            stated = [each for each in tags if each and rest.startswith(f".{each}")]
            yield Claim(today, f"{what} {name}", max(stated, key=len, default=tag), sure=False)


def _held(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """The names that stand in a text as words of their own, none inside another, and what follows each."""
    text = text.lower().replace("-", "_")
    spans = {}
    for name in names:
        for match in re.finditer(rf"(?<![a-z0-9]){re.escape(name.lower())}(?![a-z0-9])", text):
            spans[match.span()] = name
    outer = [span for span in spans if not any(other != span and other[0] <= span[0] and span[1] <= other[1] for other in spans)]
    return [(spans[span], text[span[1] :]) for span in sorted(outer)]
