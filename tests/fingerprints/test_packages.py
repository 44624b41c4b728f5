"""The package that builds a network: not asked before it is needed, missing, broken, of another version, or wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from foldexport.errors import CheckpointError, MissingDependencyError
from foldexport.fingerprints import build, matching
from foldexport.fingerprints.data import table
from foldexport.fingerprints.table import Candidate, Function, Row, Table
from foldexport.recognise import recognise
from tests.command import foldexport
from tests.fingerprints.networks import network, same_outputs, save


@pytest.fixture(scope="module")
def small():
    return network("timm", "resnet18d", num_classes=4)


@pytest.fixture
def hidden(monkeypatch):
    """Hides packages from the import system, as if they were not installed."""

    def hide(*names: str) -> None:
        for name in names:
            for loaded in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
                monkeypatch.delitem(sys.modules, loaded)
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def planted(monkeypatch, key: str, *functions: tuple[Candidate, ...]) -> None:
    """The shipped table with another row under one fingerprint."""
    rows = dict(table().rows)
    rows[key] = Row(rows[key].relation, rows[key].stem, functions, None)
    kept = {name: value for name, value in vars(table()).items() if name in Table.__dataclass_fields__}
    other = Table(**{**kept, "rows": rows})
    monkeypatch.setattr(matching, "table", lambda: other)


def key_of(candidate: Candidate) -> str:
    return next(key for key, row in table().rows.items() if any(candidate in each for each in row.functions))


def test_a_missing_package_is_named_with_what_to_install(small, tmp_path, hidden):
    path = save(tmp_path, small)
    hidden("timm")
    with pytest.raises(MissingDependencyError) as caught:
        recognise(path)
    message = str(caught.value)
    assert caught.value.exit_code == 5 and len(message.splitlines()) == 2
    for word in (str(path), "timm's resnet18d", "timm is not installed", "pip install 'foldexport[timm]'"):
        assert word in message
    assert foldexport("inspect", path).code == 5


def test_either_package_will_do(tmp_path, hidden):
    """torchvision's DenseNet and timm's are one function."""
    theirs = network("torchvision", "densenet121", num_classes=3)
    path = save(tmp_path, theirs)
    assert recognise(path).description == "densenet121 of torchvision, 3 classes"
    hidden("torchvision", "timm")
    with pytest.raises(MissingDependencyError, match=r"install 'foldexport\[torchvision\]' or 'foldexport\[timm\]'"):
        recognise(path)


def test_the_zoo_s_networks_need_neither_package(tmp_path, hidden):
    theirs = network("torchvision", "resnet18", num_classes=3)
    path = save(tmp_path, theirs, "resnet18-f37072fd.pth")
    hidden("torchvision", "timm")
    found = recognise(path)
    assert found.reason.endswith("its file name holds resnet18") and same_outputs(found.module, theirs, (3, 64, 64))


def test_looking_up_imports_neither_package(small, tmp_path):
    code = (
        "import sys; from foldexport import checkpoint, fingerprints; found = fingerprints.match(checkpoint.read(sys.argv[1])); "
        "print(found.settled.candidates[0].name); sys.exit(any(name in sys.modules for name in ('torchvision', 'timm')))"
    )
    ran = subprocess.run([sys.executable, "-c", code, save(tmp_path, small)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "resnet18d"), ran.stderr


def test_a_package_that_does_not_import_gives_its_own_message(small, tmp_path):
    package = tmp_path / "site" / "timm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-m", "foldexport", "inspect", save(tmp_path, small)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 5 and "Traceback" not in ran.stderr
    for word in ("does not import (RuntimeError: operator torchvision::nms does not exist)", torch.__version__):
        assert word in ran.stderr


def test_a_constructor_that_this_version_lacks(small, tmp_path, monkeypatch):
    planted(monkeypatch, key_of(Candidate("timm.models:resnet18d")), (Candidate("timm.models:resnet18_next"),))
    wanted = rf"timm's resnet18_next, which timm \S+ does not have.\n.*pip install 'timm=={table().versions['timm']}'"
    with pytest.raises(MissingDependencyError, match=wanted):
        recognise(save(tmp_path, small))


def test_a_planted_wrong_entry_is_reported_and_not_loaded(small, tmp_path, monkeypatch):
    planted(monkeypatch, key_of(Candidate("timm.models:resnet18d")), (Candidate("timm.models:resnet34d"),))
    with pytest.raises(CheckpointError) as caught:
        recognise(save(tmp_path, small))
    message = str(caught.value)
    assert len(message.splitlines()) == 2
    for word in ("as timm's resnet34d", "builds differs", "missing (layer1.2.conv1.weight", "--arch"):
        assert word in message


def test_loading_is_strict(small):
    function = Function((Candidate("timm.models:resnet18d"),), None, 4)
    state = dict(small.state_dict())

    def refusal(changed: dict[str, torch.Tensor]) -> str:
        with pytest.raises(CheckpointError) as caught:
            build.network(function, function.candidates, changed, {}, "net.pth")
        return str(caught.value)

    assert "1 missing (fc.bias)" in refusal({key: t for key, t in state.items() if key != "fc.bias"})
    assert "1 surplus (extra.weight)" in refusal({**state, "extra.weight": torch.ones(1)})
    assert "fc.bias is [5], wanted [4]" in refusal({**state, "fc.bias": torch.ones(5)})


def test_building_leaves_the_random_numbers_alone(small):
    function = Function((Candidate("timm.models:resnet18d"),), None, 4)
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    build.network(function, function.candidates, dict(small.state_dict()), {}, "net.pth")
    assert torch.equal(torch.rand(3), wanted)
