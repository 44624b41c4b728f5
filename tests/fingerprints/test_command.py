"""Files as scripts of torchvision and timm write them, given to the command with no option."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

from foldexport.recognise import recognise
from tests.command import files, foldexport
from tests.fingerprints.networks import network, same_outputs, save

SMALL = {
    "torchvision": ("squeezenet1_0", "squeezenet1_1", "mnasnet0_5", "mnasnet0_75", "mobilenet_v3_small", "alexnet"),
    "timm": ("lcnet_050", "tinynet_e", "resnet10t", "mobilenetv2_050", "test_resnet", "test_convnext", "selecsls42"),
}
DRAWN = [(package, random.Random(0).choice(names)) for package, names in SMALL.items()]


@pytest.mark.parametrize("package, name", DRAWN)
def test_networks_drawn_at_random_are_exported(package, name, tmp_path):
    path = save(tmp_path, network(package, name, num_classes=random.Random(name).randint(1, 9)))
    inspected = foldexport("inspect", path, "--json")
    assert inspected.code == 0, inspected.err
    done = foldexport(path, "--to", "onnx", "--input-shape", "1x3x64x64", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert files(tmp_path / "out") == ["mine.manifest.json", "mine.onnx"]
    preprocessing = json.loads((tmp_path / "out" / "mine.manifest.json").read_text())["preprocessing"]
    assert {"input_size", "mean", "std", "interpolation", "crop_pct", "num_classes"} <= preprocessing.keys()


@pytest.fixture(scope="module")
def small():
    return network("torchvision", "mobilenet_v3_small", num_classes=1)


def test_a_binary_head(small, tmp_path):
    found = recognise(save(tmp_path, small))
    assert found.num_classes == 1 and same_outputs(found.module, small, (3, 64, 64))


def test_a_checkpoint_of_a_training_script(small, tmp_path):
    """As torchvision's and the ImageNet example write it: wrapped, with the prefix of data parallelism."""
    state = {f"module.{key}": tensor for key, tensor in small.state_dict().items()}
    wrapped = {"epoch": 3, "arch": "mobilenet_v3_small", "state_dict": state, "best_acc1": torch.tensor(7.0), "optimizer": {}}
    torch.save(wrapped, tmp_path / "checkpoint.pth.tar")
    found = recognise(tmp_path / "checkpoint.pth.tar")
    assert found.name == "mobilenet_v3_small" and "the file's `arch` is mobilenet_v3_small" in found.reason
    assert same_outputs(found.module, small, (3, 64, 64))
    reference = {"model": small.state_dict(), "args": Namespace(model="mobilenet_v3_small", epochs=3), "epoch": 3}
    torch.save(reference, tmp_path / "model_3.pth")
    found = recognise(tmp_path / "model_3.pth", trust_pickle=True)
    assert found.name == "mobilenet_v3_small" and same_outputs(found.module, small, (3, 64, 64))


def test_a_folder_of_a_model_hub(tmp_path):
    theirs = network("timm", "lcnet_050", num_classes=6)
    folder = tmp_path / "models--someone--pets" / "snapshots" / "1f0a"
    folder.mkdir(parents=True)
    save_file(dict(theirs.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    config = {"tag": "ra2_in1k", "input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    (folder / "config.json").write_text(json.dumps({"architecture": "lcnet_050", "num_classes": 6, "pretrained_cfg": config}))
    found = recognise(folder / "model.safetensors")
    assert found.name == "lcnet_050" and found.input_shapes == ((1, 3, 96, 96),) and found.num_classes == 6
    assert found.preprocessing["mean"] == (0.1, 0.2, 0.3)
    assert same_outputs(found.module, theirs, (3, 64, 64))


def test_a_head_changed_and_the_auxiliary_one_left_as_it_was(tmp_path):
    theirs = network("torchvision", "fcn_resnet50", weights_backbone=None, aux_loss=True, num_classes=21)
    theirs.classifier[4] = torch.nn.Conv2d(512, 2, 1)
    found = recognise(save(tmp_path, theirs))
    assert found.num_classes == 2 and "`aux_classifier.4` has 21 classes of its own" in found.notes
    assert found.module.aux_classifier[4].out_channels == 21
    assert same_outputs(found.module, theirs, (3, 64, 64))


@pytest.mark.parametrize("change", ["shape", "missing", "surplus", "renamed"])
def test_a_planted_difference_is_not_recognised(small, change, tmp_path):
    state = dict(small.state_dict())
    key = "features.5.block.0.0.weight"
    if change == "shape":
        state[key] = state[key][:, :-1].clone()
    elif change == "surplus":
        state["features.5.block.9.weight"] = torch.ones(3)
    else:
        tensor = state.pop(key)
        state |= {"features.5.block.0.0.kernel": tensor} if change == "renamed" else {}
    torch.save(state, tmp_path / "net.pth")
    refused = foldexport("inspect", tmp_path / "net.pth")
    assert refused.code == 3 and "no known architecture has its keys" in refused.message and "--arch" in refused.message
    for name, said in (("net.pth", "the file's `arch` is mobilenet_v3_small"),
                       ("mobilenet_v3_small-047dcff4.pth", "its file name holds mobilenet_v3_small")):  # fmt: skip
        torch.save({"state_dict": state, **({"arch": "mobilenet_v3_small"} if name == "net.pth" else {})}, tmp_path / name)
        refused = foldexport("inspect", tmp_path / name)
        assert refused.code == 3 and f"{said}, but its keys and shapes are not those of torchvision's" in refused.message
        assert "pass --arch torchvision.models:mobilenet_v3_small" in refused.message


def test_heads_that_disagree_are_not_recognised(small, tmp_path):
    state = dict(small.state_dict())
    state["classifier.3.bias"] = torch.ones(2)
    torch.save(state, tmp_path / "net.pth")
    assert foldexport("inspect", tmp_path / "net.pth").code == 3


def test_networks_of_the_zoo_read_no_package(tmp_path):
    """The table is read, once and lazily; torchvision and timm are not imported."""
    path = save(tmp_path, network("torchvision", "resnet18", num_classes=3))
    code = (
        "import sys, foldexport.recognise as it; assert 'foldexport.fingerprints.data' in sys.modules; "
        "from foldexport.fingerprints.data import table; assert table.cache_info().currsize == 0; "
        "it.recognise(sys.argv[1]); assert table.cache_info().misses == 1; "
        "sys.exit(any(name in sys.modules for name in ('torchvision', 'timm')))"
    )
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr
