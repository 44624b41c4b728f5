"""These tests need the whole table of fingerprints and timm: they are collected once ``foldexport.recognise`` asks the table."""

from __future__ import annotations

import inspect

from foldexport import recognise

collect_ignore_glob = [] if "fingerprints" in inspect.getsource(recognise) else ["test_*.py"]
