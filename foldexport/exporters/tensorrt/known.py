"""What the manifests beside an engine say of it: an engine is executable code, and is opened only where one names its hash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MANIFESTS = "*.manifest.json"


def entry(path: Path) -> dict[str, Any] | None:
    """What the manifests in the engine's folder say of a file of its name; None where none does."""
    found: dict[str, Any] | None = None
    for manifest in sorted(path.parent.glob(MANIFESTS)):
        try:
            document = json.loads(manifest.read_text(encoding="utf-8"))
            named = [(each, file) for each in document["artifacts"] for file in each["files"] if file["name"] == path.name]
            for artifact, file in named:
                notes = artifact.get("notes") or {}
                found = found or {"sha256": set(), "flavour": notes.get("flavour"), "targets": notes.get("targets")}
                found["sha256"].add(file["sha256"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not one of ours
    return found
