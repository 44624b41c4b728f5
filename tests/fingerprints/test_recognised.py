"""Files of torchvision and timm, recognised without an option: the right network, its inputs, and its outputs."""

from __future__ import annotations

import pytest

from foldexport import zoo
from foldexport.recognise import recognise
from tests.fingerprints.networks import network, same_outputs, save

NORMALISED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SEGMENTATION = {"weights_backbone": None}

# package, name, arguments, what is expected of the preprocessing, the size to run at
UNIQUE = [
    ("torchvision", "alexnet", {"num_classes": 7}, {"input_size": (3, 224, 224), **NORMALISED}, 64),
    ("torchvision", "squeezenet1_1", {}, {"crop_pct": 0.875, "interpolation": "bilinear"}, 64),
    ("torchvision", "densenet121", {"num_classes": 3}, {"input_size": (3, 224, 224), **NORMALISED}, 64),
    ("torchvision", "mobilenet_v2", {"num_classes": 10}, {"input_size": (3, 224, 224), **NORMALISED}, 64),
    ("torchvision", "mobilenet_v3_small", {}, {"crop_pct": 0.875, **NORMALISED}, 64),
    ("torchvision", "mnasnet0_5", {"num_classes": 12}, {"crop_pct": 0.875, **NORMALISED}, 64),
    ("torchvision", "shufflenet_v2_x0_5", {"num_classes": 5}, {"crop_pct": 0.875, **NORMALISED}, 64),
    ("torchvision", "efficientnet_b0", {"num_classes": 4}, {"interpolation": "bicubic", **NORMALISED}, 64),
    ("torchvision", "regnet_x_400mf", {"num_classes": 6}, {"input_size": (3, 224, 224), **NORMALISED}, 64),
    ("torchvision", "convnext_tiny", {"num_classes": 2}, {"crop_pct": 0.949152, **NORMALISED}, 64),
    ("torchvision", "fcn_resnet50", {**SEGMENTATION, "num_classes": 5}, {"input_size": (3, 520, 520), **NORMALISED}, 64),
    ("torchvision", "deeplabv3_resnet50", {**SEGMENTATION, "aux_loss": True}, {"input_size": (3, 520, 520)}, 64),
    ("torchvision", "lraspp_mobilenet_v3_large", {**SEGMENTATION, "num_classes": 3}, {"input_size": (3, 520, 520)}, 64),
    ("timm", "resnet18d", {"num_classes": 9}, {"interpolation": "bicubic", **NORMALISED}, 64),
    ("timm", "seresnet50", {"num_classes": 3}, {"interpolation": "bicubic", **NORMALISED}, 64),
    ("timm", "regnety_002", {"num_classes": 4}, {"interpolation": "bicubic", **NORMALISED}, 64),
    ("timm", "ghostnet_050", {"num_classes": 3}, {"input_size": (3, 224, 224)}, 64),
    ("timm", "repvgg_a0", {}, {"input_size": (3, 224, 224), **NORMALISED}, 64),
    ("timm", "mobileone_s0", {"num_classes": 5}, {"crop_pct": 0.875}, 64),
    ("timm", "convnext_atto", {"num_classes": 4}, {"interpolation": "bicubic", **NORMALISED}, 64),
    ("timm", "dla34", {"num_classes": 3}, {"interpolation": "bilinear"}, 64),
    ("timm", "hrnet_w18_small", {"num_classes": 3}, {"input_size": (3, 224, 224), **NORMALISED}, 64),
    ("timm", "coatnet_nano_rw_224", {"num_classes": 6}, {"input_size": (3, 224, 224), **HALVES}, 224),
]


@pytest.mark.parametrize("package, name, arguments, expected, size", UNIQUE, ids=[each[1] for each in UNIQUE])
def test_a_state_dict_alone(package, name, arguments, expected, size, tmp_path):
    theirs = network(package, name, **arguments)
    found = recognise(save(tmp_path, theirs))
    of_zoo = any(family.recognises(theirs.state_dict()) for family in zoo.FAMILIES)  # may add in another order
    assert same_outputs(found.module, theirs, (3, size, size), rtol=1e-12 if of_zoo else 0.0) and not found.module.training
    assert found.preprocessing.items() >= expected.items()
    classes = arguments.get("num_classes", 21 if package == "torchvision" and "weights_backbone" in arguments else 1000)
    assert found.num_classes == found.preprocessing["num_classes"] == classes
    assert found.input_shapes == ((1, *found.preprocessing["input_size"]),)
    if not of_zoo:
        assert (found.name, found.description) == (name, f"{name} of {package}, {classes} classes")
        assert f"keys and their shapes are those of {package}'s {name}" in found.reason
