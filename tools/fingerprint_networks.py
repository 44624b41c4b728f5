"""What torchvision and timm have: constructors, published weights, and how those take their images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torchvision
from timm.models import _registry as registry
from torch import nn
from torch.nn.modules.conv import _ConvNd

from foldexport.fingerprints.table import Candidate

CONVOLUTIONAL_SHARE = 0.1  # of the layers with weights, convolutions and linear layers; vision transformers have 0.07 at most

TORCHVISION_MODULES = ("torchvision.models", "torchvision.models.segmentation", "torchvision.models.video")
DETECTION = "foldexport.fingerprints.detection:convolutional_part"
USUAL_EPS = 1e-5
VIDEO_FRAMES = 16

HASH = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|tar|pth\.tar)$")


@dataclass
class Weights:
    """``inputs``: input size, interpolation, mean, std, crop_pct.   ``arguments``: what the constructor needs for them."""

    tag: str
    inputs: tuple
    num_classes: int
    url: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """The first eight digits of the SHA-256, where the file's name ends with them."""
        found = HASH.search(self.url)
        return found[1][:8] if found else ""


@dataclass
class Offer:
    """One network of a package: its variants with keys, shapes or functions of their own, and its weights, default first."""

    package: str
    name: str
    variants: list[Candidate]
    weights: list[Weights]


def offers() -> Iterator[Offer]:
    yield from of_torchvision()
    yield from _detectors()
    yield from of_timm()


def of_timm() -> Iterator[Offer]:
    for name in sorted(registry.list_models()):
        yield Offer("timm", name, [Candidate(f"timm.models:{name}")], _timm_weights(name))


def of_torchvision() -> Iterator[Offer]:
    """All but its detectors."""
    for place in TORCHVISION_MODULES:
        module = __import__(place, fromlist=["*"])
        for name in torchvision.models.list_models(module=module):
            weights = _torchvision_weights(name)
            yield Offer("torchvision", name, _torchvision_variants(place, name, weights), weights)


def is_convolutional(network: nn.Module) -> bool:
    """Whether at least one in ten of its layers with weights is a convolution: all but vision transformers and MLPs."""
    convolutions = sum(isinstance(each, _ConvNd) for each in network.modules())
    linear = sum(isinstance(each, nn.Linear) for each in network.modules())
    return convolutions > 0 and convolutions >= CONVOLUTIONAL_SHARE * (convolutions + linear)


def former_names() -> dict[str, tuple[str, str]]:
    """timm's names of old, and the name and tag of today."""
    today = {old: new.partition(".") for old, new in registry.get_deprecated_models().items() if new}
    return {old: (name, tag) for old, (name, _, tag) in today.items()}


def _timm_weights(name: str) -> list[Weights]:
    configs = registry.get_arch_pretrained_cfgs(name)
    found = []
    for full, config in configs.items():
        inputs = (tuple(config.input_size), config.interpolation, config.mean, config.std, config.crop_pct)
        url = config.url if isinstance(config.url, str) else ""
        found.append(Weights(full.partition(".")[2], inputs, config.num_classes, url))
    return found


def _torchvision_variants(place: str, name: str, weights: list[Weights]) -> list[Candidate]:
    spec = f"{place}:{name}"
    if name in ("googlenet", "inception_v3"):
        for each in weights:
            each.arguments = {"transform_input": True}
        return [
            Candidate(spec, {"transform_input": transform, "aux_logits": aux, "init_weights": False})
            for transform in (True, False) for aux in (True, False)
        ]  # fmt: skip
    if name.startswith("vit_"):  # the size is in the position embedding
        for each in weights:
            each.arguments = {"image_size": each.inputs[0][-1]}
        sizes = dict.fromkeys(each.inputs[0][-1] for each in weights)
        return [Candidate(spec, {"image_size": size}) for size in sizes]
    if place.endswith("segmentation") and name.startswith("lraspp"):
        return [Candidate(spec, {"weights_backbone": None})]
    if place.endswith("segmentation"):
        return [Candidate(spec, {"weights_backbone": None, "aux_loss": aux}) for aux in (True, False)]
    return [Candidate(spec)]


def _torchvision_weights(name: str) -> list[Weights]:
    """The default first."""
    found = [each for each in torchvision.models.get_model_weights(name) if each.meta["categories"]]  # else of features only
    default = torchvision.models.get_model_weights(name).DEFAULT
    return [
        Weights(each.name, _torchvision_inputs(each.transforms()), len(each.meta["categories"]), each.url)
        for each in sorted(found, key=lambda each: each != default)
    ]


def _torchvision_inputs(transform: Any) -> tuple:
    mean, std = tuple(transform.mean), tuple(transform.std)
    resize = transform.resize_size
    crop = getattr(transform, "crop_size", None) or resize
    height, width = (crop[0], crop[-1])
    frames = () if type(transform).__name__ != "VideoClassification" else (VIDEO_FRAMES,)
    share = math.floor(1e6 * min(height, width) / min(resize)) / 1e6  # rounded down, so that size / share is not below resize
    return ((3, *frames, height, width), transform.interpolation.value, mean, std, share)


def _detectors() -> Iterator[Offer]:
    for name in torchvision.models.list_models(module=torchvision.models.detection):
        network = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        weights = []
        for each in torchvision.models.get_model_weights(name):
            eps = {"eps": 0.0 if _zero_eps(name, each.name) else USUAL_EPS}
            weights.append(Weights(each.name, _detector_inputs(network), len(each.meta["categories"]), each.url, eps))
        if all(each.arguments["eps"] for each in weights):
            variants = [{}]
            for each in weights:
                each.arguments = {}
        else:
            variants = [{"eps": USUAL_EPS}, {"eps": 0.0}]
        yield Offer("torchvision", name, [Candidate(DETECTION, {"model": name, **each}) for each in variants], weights)


def _zero_eps(name: str, tag: str) -> bool:
    """Whether torchvision sets the batch norms' eps to 0 with these weights (``overwrite_eps`` in its detection models)."""
    models = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
    return name in models and tag == "COCO_V1"


def _detector_inputs(network: nn.Module) -> tuple:
    transform = network.transform
    size = transform.fixed_size or (transform.min_size[-1],) * 2
    return ((3, *size), "bilinear", tuple(transform.image_mean), tuple(transform.image_std), 1.0)
