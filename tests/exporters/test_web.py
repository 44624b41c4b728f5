"""ONNX for browsers: run by onnxruntime-web under Node, and what is said where one of them is missing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from foldexport import exporters
from foldexport.errors import EquivalenceError, MissingDependencyError, PrecisionError
from foldexport.exporters import get
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.web import node
from foldexport.exporters.web.exporter import WebExporter
from tests.command import foldexport, save_plain
from tests.exporters import formats, networks
from tests.exporters.formats import EXAMPLE
from tests.exporters.networks import IMAGE

EXPORTER = WebExporter()
HERE = "FOLDEXPORT_TEST_WEB"  # set where Node and the package are declared to be there: then nothing may skip


@pytest.fixture(scope="module")
def web() -> node.Web:
    try:
        return node.require()
    except MissingDependencyError as error:
        (pytest.fail if os.environ.get(HERE) else pytest.skip)(str(error))


@pytest.fixture(scope="module")
def made(web, tmp_path_factory):
    module, path = formats.folded(), tmp_path_factory.mktemp("web") / "net.web.onnx"
    return module, path, EXPORTER.export(module, EXAMPLE, path)


def test_batches_one_and_three_with_every_weight(made, web):
    module, path, notes = made
    found = formats.found(EXPORTER, module, path)
    assert found.ok and not found.message and found.batches == (1, 3) and found.weights_identical == (8, 8), found
    assert found.runtime == f"onnxruntime-web {web.version}" and notes["backend"] == "wasm"


def test_several_inputs_and_outputs(web, tmp_path):
    module = networks.TwoByThree().eval()
    EXPORTER.export(module, (torch.zeros(1, *IMAGE), torch.zeros(1, 5)), tmp_path / "net.web.onnx")
    assert networks.proof(EXPORTER, module, networks.probes(IMAGE, (5,)), tmp_path / "net.web.onnx").ok


def test_same_bytes_from_another_process_and_no_path_inside(web, tmp_path):
    EXPORTER.export(networks.chain(), EXAMPLE, tmp_path / "net.web.onnx")
    (other,) = formats.from_another_process(get("web"), tmp_path)
    assert other.read_bytes() == (tmp_path / "net.web.onnx").read_bytes() and networks.local_traces(other) == []


def test_fp16_ends_and_arithmetic(web, tmp_path):
    module, (probe,) = formats.folded(), networks.probes(IMAGE, batches=(3,))
    wanted = module(probe[0]).detach().numpy()
    options = ExportOptions(precision="fp16", half_io=True)
    EXPORTER.export(module.half(), (EXAMPLE[0].half(),), tmp_path / "net.web.onnx", options)
    found = EXPORTER.load(tmp_path / "net.web.onnx")(probe[0].half().numpy())[0]
    assert found.dtype == np.float16 and np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max()
    assert EXPORTER.precision_of(tmp_path / "net.web.onnx") == {"float16": 4}


def test_bf16_is_refused(tmp_path):
    with pytest.raises(PrecisionError, match="onnxruntime-web is written in fp32 or fp16, not bf16"):
        EXPORTER.export(networks.chain(4), EXAMPLE, tmp_path / "net.web.onnx", ExportOptions(precision="bf16"))


def test_a_wrong_weight_in_the_file_is_caught(web, tmp_path):
    module, path = formats.folded(), tmp_path / "net.web.onnx"
    EXPORTER.export(module, EXAMPLE, path)
    right = module.get_parameter("body.3.weight").detach().numpy()
    wrong = right.copy()
    wrong.flat[5] *= np.float32(1 + 2**-20)
    formats.replace(path, right.tobytes(), wrong.tobytes())
    assert "differ from the module's in their bits: body.3.weight" in formats.found(EXPORTER, module, path).message


def test_what_the_runtime_says_is_told(made, web, tmp_path):
    (tmp_path / "net.web.onnx").write_bytes(b"no network at all")
    with pytest.raises(EquivalenceError, match=f"onnxruntime-web {web.version} refuses the file: "):
        EXPORTER.load(tmp_path / "net.web.onnx")
    session = EXPORTER.load(made[1])
    with pytest.raises(RuntimeError, match="has 1 inputs, 2 were given"):
        session(np.zeros(1), np.zeros(1))
    with pytest.raises(RuntimeError, match="[Ii]nvalid|dimension|[Gg]ot"):
        session(np.zeros((1, 5, 16, 16), np.float32))
    assert session(np.zeros((1, *IMAGE), np.float32))[0].shape == (1, 10)  # a refused input does not end it


def test_a_process_that_ends_is_told(made):
    session = EXPORTER.load(made[1])
    session._child.process.kill()
    with pytest.raises(RuntimeError, match="its Node process ended"):
        session(np.zeros((1, *IMAGE), np.float32))


# ---- what is missing


@pytest.fixture
def elsewhere(monkeypatch, tmp_path) -> Path:
    """A folder without the package, and no variable that names one."""
    for name in (node.VARIABLE, "NODE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without(monkeypatch, *programs: str) -> None:
    real = node.shutil.which
    monkeypatch.setattr(node.shutil, "which", lambda name: None if name in programs else real(name))


def test_without_node(monkeypatch, elsewhere):
    without(monkeypatch, "node")
    words = "there is no node on PATH: install it .*apt install nodejs npm.*npm install onnxruntime-web"
    with pytest.raises(MissingDependencyError, match=words) as caught:
        exporters.require_writable(get("web"))
    assert caught.value.exit_code == 5
    (row,) = [each for each in exporters.status() if each.format.name == "onnxruntime-web"]
    assert not row.works and "no node on PATH" in row.reason
    checkpoint, arch = save_plain(elsewhere)
    result = foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x8x8", "--to", "web")
    assert result.code == 5 and "npm install onnxruntime-web" in result.message


@pytest.fixture
def some_node(monkeypatch) -> None:
    """A Node.js of version 20 and no npm, whatever is here."""
    monkeypatch.setattr(node.shutil, "which", lambda name: "/bin/node" if name == "node" else None)
    monkeypatch.setattr(node, "_said", lambda program, *words: "v20.1.0")


def test_without_the_package(some_node, elsewhere):
    with pytest.raises(MissingDependencyError, match="neither in a node_modules folder here or above nor global: npm install"):
        node.require()


def test_an_old_node(some_node, monkeypatch, elsewhere):
    monkeypatch.setattr(node, "_said", lambda program, *words: "v12.3.4")
    with pytest.raises(MissingDependencyError, match="needs Node.js 18 or later; /bin/node is 12"):
        node.require()


@pytest.mark.parametrize("where", ["above", "variable", "variable's folder", "global"])
def test_where_the_package_is_found(some_node, monkeypatch, elsewhere, where):
    modules = elsewhere / "there" / "node_modules"
    package = modules / "onnxruntime-web"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"version": "1.2.3"}')
    (elsewhere / "there" / "deep" / "deeper").mkdir(parents=True)
    if where == "above":
        monkeypatch.chdir(elsewhere / "there" / "deep" / "deeper")
    elif where == "global":
        monkeypatch.setattr(node.shutil, "which", lambda name: f"/bin/{name}")
        monkeypatch.setattr(node, "_said", lambda program, *words: str(modules) if words == ("root", "-g") else "v20.1.0")
    else:
        monkeypatch.setenv(node.VARIABLE, str(modules if where == "variable" else modules.parent))
    assert node.require() == node.Web("/bin/node", package, "1.2.3")
