"""What a page shows, collected as plain values: the record that the manifest holds, both networks, and the signal.

Nothing in it depends on the day, the folder or how long anything took.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldexport import __version__, destination, manifest, probes, propagation
from foldexport.errors import FoldexportError, UsageError
from foldexport.report.html.networks import networks

if TYPE_CHECKING:
    from foldexport.fold.rebuild import Program
    from foldexport.study import Study

SUFFIX = ".html"
LEFT_OUT = ("golden", "seconds", "versions", "command", "foldexport")


def check(path: Path, *inputs: Path, overwrite: bool = False) -> None:
    """Whether a page can be put at ``path``, before any work; what the command reads is never replaced. Raises UsageError."""
    for each in inputs:
        with contextlib.suppress(OSError):
            if path.samefile(each):
                raise UsageError(f"--report {path}: is what the command reads; name another file.")
    destination.check_extra(path, "--report", SUFFIX, "the report is a web page", overwrite=overwrite)


def of_study(
    study: Study, record: Mapping[str, Any], *, seed: int = 0, command: Sequence[str] = (), manifest_name: str = ""
) -> dict[str, Any]:
    """The document of a conversion or an inspection.

    record: the manifest, or what `foldexport.manifest.describe` gives. manifest_name: of the file that holds it, if any.
    """
    program = study.refold() if study.refold is not None else None
    return {
        "kind": "study",
        "record": {key: value for key, value in record.items() if key not in LEFT_OUT},
        "graph": networks(study, program),
        "propagation": _signal(study, program, seed),
        **_origin(command),
        "manifest": manifest_name,
    }


def _signal(study: Study, program: Program | None, seed: int) -> dict[str, Any] | None:
    """None where it cannot be measured: the page is about a network that is proved, with this curve or without."""
    if probes.is_huge(study.graph):  # gradients keep every activation
        return None
    try:
        return propagation.measure(study.graph, program, data=study.data, seed=seed).to_dict()
    except (FoldexportError, RuntimeError):  # an operator without a derivative, no memory for one
        return None


def of_timing(timing: Mapping[str, Any], *, command: Sequence[str] = ()) -> dict[str, Any]:
    """The document of a benchmark, from its JSON."""
    return {"kind": "bench", "record": {}, "timing": timing, **_origin(command)}


def _origin(command: Sequence[str]) -> dict[str, Any]:
    return {
        "version": __version__, "versions": manifest.versions(),
        "command": [manifest.without_folders(word) for word in command],
    }  # fmt: skip
