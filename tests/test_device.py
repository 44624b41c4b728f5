"""torch's switches of float32, in a process of their own: torch cannot put back every mixture of its old and new ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SWITCHES = Path(__file__).with_name("device_switches.py")


def test_switches_are_put_back() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(SWITCHES)],
        cwd=SWITCHES.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
