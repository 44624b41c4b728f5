"""The pages on formats: what they show is run as it stands, and computes what the network computes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import foldexport
from foldexport.errors import MissingDependencyError
from foldexport.exporters import FORMATS, get
from foldexport.exporters.aotinductor import compiler
from tests.exporters import formats
from tests.exporters.installed import need

DOCS = Path(__file__).resolve().parents[1] / "docs" / "formats"
PAGES = {
    "openvino": ("openvino", "python"),
    "pt2": ("pt2", "python"),
    "aotinductor": ("aotinductor", "python"),
    "ort": ("ort", "python"),
    "onnxruntime-web": ("onnxruntime-web", "js"),
    "executorch": ("executorch", "python"),
    "litert": ("litert", "python"),
    "ncnn": ("ncnn", "python"),
    "coreml": ("coreml", "none that runs here"),
}
TENSORS = ("pt2", "aotinductor")
IMAGES = torch.randn(2, *formats.IMAGE, generator=torch.Generator().manual_seed(3))


def snippet(page: str, language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found, f"{page}.md shows no {language}"
    return found[0]


@pytest.fixture(scope="module")
def folded():
    module = formats.randomise(formats.Skip(), 5)
    return module, foldexport.fold(module, formats.EXAMPLE)


@pytest.mark.parametrize("page", [name for name, (_, language) in PAGES.items() if language == "python"])
def test_python(page, folded, tmp_path):
    module, result = folded
    row = get(PAGES[page][0])
    if page == "aotinductor" and compiler.lacks():
        pytest.skip(f"aotinductor {compiler.lacks()}")
    need(row.name)
    foldexport.export(result, row.name, tmp_path / f"net{row.suffix}")
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    load = "import numpy as np, torch\nimages = np.load('images.npy')\n"
    load += "images = torch.from_numpy(images)\n" if page in TENSORS else ""
    save = "\nnp.save('outputs.npy', np.asarray(outputs))\n"
    code = load + snippet(page, "python") + save
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    _require_close(np.load(tmp_path / "outputs.npy"), module)


def test_javascript(folded, tmp_path):
    from foldexport.exporters.web import node

    try:
        web = node.require()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    module, result = folded
    foldexport.export(result, "web", tmp_path / "net.web.onnx")
    (tmp_path / "images.bin").write_bytes(IMAGES.numpy().tobytes())
    (tmp_path / "node_modules").symlink_to(web.package.parent)
    head = (
        'import { readFileSync, writeFileSync } from "node:fs";\n'
        'const file = readFileSync("images.bin");\n'
        "const images = new Float32Array(file.buffer, file.byteOffset, file.length / 4);\n"
        f"const shape = {list(IMAGES.shape)};\n"
    )
    body = snippet("onnxruntime-web", "js")
    tail = '\nwriteFileSync("outputs.bin", Buffer.from(outputs.buffer, outputs.byteOffset, outputs.byteLength));\n'
    (tmp_path / "run.mjs").write_text(head + body + tail)
    ran = subprocess.run([web.node, "run.mjs"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    _require_close(np.fromfile(tmp_path / "outputs.bin", np.float32).reshape(len(IMAGES), -1), module)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_file_names_are_those_of_the_format(page):
    text, row = (DOCS / f"{page}.md").read_text(encoding="utf-8"), FORMATS[PAGES[page][0]]
    assert f"foldexport net.pth --to {row.name}" in text
    assert all(f"net{suffix}" in text for suffix in (row.suffix, *row.companions))
    assert (f"foldexport[{row.extra}]" in text) == bool(row.extra)


def _require_close(found: np.ndarray, module: torch.nn.Module) -> None:
    with torch.no_grad():
        wanted = module.double()(IMAGES.double()).numpy()
    module.float()
    assert found.shape == wanted.shape and np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
