"""Formats with heavy packages: tests of one that is not installed are skipped, but fail where a run installs what tests need."""

from __future__ import annotations

import os
from typing import Any

import pytest

from foldexport import exporters


def need(name: str) -> Any:
    """The exporter of a format."""
    row = exporters.get(name)
    missing = row.missing()
    if missing:
        stop = pytest.fail if os.environ.get("CI") or not row.extra else pytest.skip
        stop(f"{', '.join(missing)} is not installed: {row.install}")
    return exporters.exporter(row)
