"""The part of torchvision's detectors that is a fixed function of the image: what can be folded and exported.

Proposals, box decoding and non-maximum suppression depend on values; around them a detector is

    two stages (Faster, Mask, Keypoint R-CNN):  image → backbone → feature maps
    one stage (RetinaNet, FCOS, SSD, SSDlite):  image → backbone → head → class scores and boxes of every anchor
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class ConvolutionalPart(nn.Module):
    """A detector's backbone, and its head where that reads nothing but the backbone's feature maps.

    The children are the detector's own, so that its whole checkpoint fits; those that are not called here are not folded.
    Input: images as the detector's own transform gives them, normalised, [N, 3, H, W].
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        for name, child in detector.named_children():
            if name != "transform":  # has no tensors
                self.add_module(name, child)
        self.one_stage = not hasattr(detector, "roi_heads")

    def forward(self, image: Tensor) -> Mapping[str, Tensor]:
        features = self.backbone(image)
        return self.head(list(features.values())) if self.one_stage else features


def convolutional_part(model: str, *, eps: float | None = None, **arguments: Any) -> ConvolutionalPart:
    """``model``: a name of ``torchvision.models.detection``, built without weights, with these arguments.

    eps: of the batch norms. torchvision sets 0 with the weights COCO_V1 of the ResNet-50 networks, which were trained so, and
    what is fine-tuned from them keeps it; else 1e-5.
    """
    from torchvision.models import detection

    detector = getattr(detection, model)(weights=None, weights_backbone=None, **arguments)
    if eps is not None:
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = eps
    return ConvolutionalPart(detector)
