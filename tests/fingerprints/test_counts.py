"""What may differ from a published network and still is it: classes, channels, counters, prefixes, old names, auxiliary heads."""

from __future__ import annotations

import re

import pytest
import torch

from foldexport import fold
from foldexport.errors import UsageError
from foldexport.recognise import recognise
from tests.fingerprints.networks import network, same_outputs, save


@pytest.fixture(scope="module")
def small():
    return network("timm", "resnet18d", num_classes=4)


def test_another_number_of_channels(tmp_path):
    theirs = network("timm", "resnet18d", in_chans=1, num_classes=3)
    found = recognise(save(tmp_path, theirs))
    assert found.input_shapes == ((1, 1, 224, 224),) and found.num_classes == 3
    assert "mean" not in found.preprocessing and any("in_chans is 1" in each for each in found.notes)
    assert same_outputs(found.module, theirs, (1, 64, 64))


def test_no_classifier(tmp_path):
    theirs = network("timm", "resnet18d", num_classes=0)
    found = recognise(save(tmp_path, theirs))
    assert found.description == "resnet18d of timm, no last layer"
    assert same_outputs(found.module, theirs, (3, 64, 64))


def test_as_many_classes_as_channels_elsewhere(tmp_path):
    theirs = network("timm", "resnet18d", num_classes=512)
    assert recognise(save(tmp_path, theirs)).num_classes == 512


def test_without_counters_and_with_any_prefix(small, tmp_path):
    state = {f"module.encoder.{key}": t for key, t in small.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "net.pth")
    found = recognise(tmp_path / "net.pth")
    assert found.name == "resnet18d" and any("stripping the prefix `encoder.`" in each for each in found.notes)
    assert same_outputs(found.module, small, (3, 64, 64))


def test_float64_and_half_precision(small, tmp_path):
    wide = recognise(save(tmp_path, network("timm", "resnet18d", num_classes=4).double()))
    assert {p.dtype for p in wide.module.parameters()} == {torch.float64}
    narrow = recognise(save(tmp_path, network("timm", "resnet18d", num_classes=4).half()))
    assert {p.dtype for p in narrow.module.parameters()} == {torch.float32}
    assert any("half-precision weights were widened" in each for each in narrow.notes)


def test_names_of_old_densenets(tmp_path):
    """Published DenseNets have ``norm.1`` where the network has ``norm1``; torchvision renames them while it loads."""
    theirs = network("torchvision", "densenet121", num_classes=3)
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", key): t for key, t in theirs.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet121.pth")
    assert same_outputs(recognise(tmp_path / "densenet121.pth").module, theirs, (3, 64, 64))


@pytest.mark.parametrize("aux", [True, False])
def test_auxiliary_heads(aux, tmp_path):
    theirs = network("torchvision", "inception_v3", num_classes=6, aux_logits=aux)
    found = recognise(save(tmp_path, theirs), arch_args={"transform_input": False})
    assert same_outputs(found.module, theirs, (3, 96, 96))
    segments = network("torchvision", "fcn_resnet50", weights_backbone=None, aux_loss=aux, num_classes=2)
    outputs = recognise(save(tmp_path, segments)).module(torch.zeros(1, 3, 64, 64))
    assert list(outputs) == (["out", "aux"] if aux else ["out"])


def test_films(tmp_path):
    theirs = network("torchvision", "r3d_18", num_classes=3)
    found = recognise(save(tmp_path, theirs))
    assert found.input_shapes == ((1, 3, 16, 112, 112),) and "input_size" not in found.preprocessing
    assert same_outputs(found.module, theirs, (3, 4, 32, 32))


@pytest.mark.parametrize("name, size, outputs", [
    ("ssdlite320_mobilenet_v3_large", 320, {"bbox_regression", "cls_logits"}),
    ("fasterrcnn_mobilenet_v3_large_320_fpn", 320, {"0", "1", "pool"}),
])  # fmt: skip
def test_detectors_give_the_part_that_is_a_function_of_the_image(name, size, outputs, tmp_path):
    theirs = network("torchvision", name, weights_backbone=None, num_classes=4)
    found = recognise(save(tmp_path, theirs))
    assert found.num_classes == 4 and found.input_shapes == ((1, 3, size, size),)
    assert any("non-maximum suppression" in each for each in found.notes)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = theirs.backbone(image)
        expected = features if "0" in outputs else theirs.head(list(features.values()))
        made = found.module(image)
    assert set(made) == outputs and all(torch.equal(made[key], expected[key]) for key in outputs)


def test_eps_of_detectors_is_asked_for(tmp_path):
    """torchvision's first Faster R-CNN weights want eps 0, files of the same shapes that were not tuned from them 1e-5."""
    theirs = network("torchvision", "fasterrcnn_resnet50_fpn", weights_backbone=None, num_classes=3)
    path = save(tmp_path, theirs)
    for eps in (1e-5, 0.0):
        backbone = recognise(path, arch_args={"eps": eps}).module.backbone.body
        assert backbone.bn1.eps == eps and backbone.layer4[2].bn3.eps == eps


def test_arguments_overrule_and_wrong_ones_are_refused(small, tmp_path):
    path = save(tmp_path, small)
    assert recognise(path, arch_args={"drop_rate": 0.5}).module.drop_rate == 0.5
    with pytest.raises(UsageError, match=r"timm\.models:resnet18d .*depth"):
        recognise(path, arch_args={"depth": 34})


def test_a_recognised_network_folds(small, tmp_path):
    found = recognise(save(tmp_path, small))
    folded = fold(found.module, torch.randn(1, 3, 64, 64))
    assert folded.counts_before["batch_norm"] == 22 and "batch_norm" not in folded.counts_after
