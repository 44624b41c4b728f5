"""The JSON documents of ``--json``: one per command, with ``ok`` first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foldexport.exporters import Status
    from foldexport.pipeline import Outcome
    from foldexport.recheck import Checked
    from foldexport.study import Question, Study


def outcome(done: Outcome) -> dict[str, Any]:
    """The manifest, without its golden values, and where the files are."""
    files = [str(path) for path in done.files if path != done.manifest_path]
    rest = {key: value for key, value in done.manifest.items() if key != "golden"}
    rest |= {"report": str(done.report)} if done.report is not None else {}
    return {"ok": True, "manifest": str(done.manifest_path), "files": files, **rest}


def study(question: Question, found: Study) -> dict[str, Any]:
    """What was recognised, the ledger and the certificate."""
    from foldexport.manifest import describe, plain

    return {"ok": True, **describe(question, found), "seconds": plain(found.seconds)}


def checked(found: Sequence[Checked]) -> dict[str, Any]:
    """Every artifact with its comparison, and whether all hold."""
    from foldexport.manifest import plain

    return {"ok": all(each.ok for each in found), "artifacts": plain([each.to_dict() for each in found])}


def formats(rows: Sequence[Status]) -> dict[str, Any]:
    """Every format and whether it works here."""
    return {
        "ok": True,
        "formats": [
            {
                "name": row.format.name, "aliases": list(row.format.aliases), "suffix": row.format.suffix,
                "companions": list(row.format.companions),
                "description": row.format.description, "extra": row.format.extra, "works": row.works,
                "runtime": row.runtime or row.format.runtime, "version": row.version, "reason": row.reason,
            }
            for row in rows
        ],
    }  # fmt: skip
