"""Every command on the first page, run as it is printed, in a folder that holds what a fresh clone does; and its facts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from foldexport.exporters import FORMATS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALLS = re.compile(r"^pip install .*$", re.MULTILINE)


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for text in (INSTALLS.sub("", block).strip() for block in found) if text]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    (folder / "models").symlink_to(ROOT / "models")
    return folder


def shell(text: str, folder: Path) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=folder, env={**os.environ, "PATH": path},
                          capture_output=True, text=True, check=False)  # fmt: skip


@pytest.mark.parametrize("text", blocks("sh"), ids=lambda text: re.sub(r"\W+", "-", text.splitlines()[-1])[:60])
def test_commands_work_as_printed(text, clone) -> None:
    done = shell(text, clone)
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("text", blocks("python"), ids=["library"])
def test_the_library_s_lines_work_as_printed(text, clone) -> None:
    done = subprocess.run([sys.executable, "-c", text], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_format_is_in_the_table() -> None:
    table = PAGE[PAGE.index("| `--to` |") :]
    for row in FORMATS.values():
        line = next((line for line in table.splitlines() if re.match(rf"\| \[?`{re.escape(row.name)}`", line)), None)
        assert line is not None, row.name
        assert all(f"`{suffix}`" in line for suffix in (row.suffix, *row.companions)), line
        assert not row.extra or f"[{row.extra}]" in line, line


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE) + re.findall(r'src="([^"]+)"', PAGE):
        assert target.startswith("https://") or (ROOT / target).exists(), target
