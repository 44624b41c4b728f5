"""Every network of the zoo: family → title → how it is built and the size of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from foldexport.zoo.acnet import acnet
from foldexport.zoo.dbb import dbb
from foldexport.zoo.diracnet import diracnet
from foldexport.zoo.mobileone import VARIANTS as MOBILEONES
from foldexport.zoo.mobileone import mobileone
from foldexport.zoo.nfresnet import BLOCKS as NF_DEPTHS
from foldexport.zoo.nfresnet import SCHEMES, nfresnet
from foldexport.zoo.preresnet import ORDERS, SHORTCUTS, preresnet
from foldexport.zoo.repvgg import VARIANTS as REPVGGS
from foldexport.zoo.repvgg import repvgg
from foldexport.zoo.resnet import resnet
from foldexport.zoo.vgg import CONFIGURATIONS, vgg
from foldexport.zoo.wideresnet import wideresnet

CIFAR = (3, 32, 32)
IMAGENET = (3, 64, 64)  # smaller than what such networks are trained on: what folds does not depend on it, the time does
GATES = ("exclusive_gating", "shortcut_gating")


@dataclass(frozen=True)
class Entry:
    """A network. ``gated``: factors computed from its input are a part of it, and stay."""

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    gated: bool = False


def entries() -> dict[str, dict[str, Entry]]:
    """Family → title → entry."""
    return {
        "DiracNet": _diracnets(), "Residual networks without batch norm": _nfresnets(),
        "Pre-activation residual networks": _preresnets(), "Residual networks": _resnets(),
        "Wide residual networks": _wideresnets(), "VGG": _vggs(), "RepVGG": _repvggs(), "MobileOne": _mobileones(),
        "ACNet": _acnets(), "Diverse branch block": _dbbs(),
    }  # fmt: skip


def _diracnets() -> dict[str, Entry]:
    sizes = ((28, 1), (34, 2))
    found = {f"v{v} CIFAR {d}-{w}": Entry(partial(diracnet, "CIFAR", d, w, version=v), CIFAR) for v in (1, 2) for d, w in sizes}
    return found | {f"v2 ImageNet {d}": Entry(partial(diracnet, "ImageNet", d), IMAGENET) for d in (18, 34)}


def _nfresnets() -> dict[str, Entry]:
    found = {f"ResNet-{d} {s}": Entry(partial(nfresnet, d, s), CIFAR) for d in NF_DEPTHS for s in SCHEMES}
    return found | {"ResNet-50 idshort, ImageNet": Entry(partial(nfresnet, 50, "idshort", stem="imagenet"), IMAGENET)}


def _preresnets() -> dict[str, Entry]:
    found = {
        f"110, {order}, {shortcut}": Entry(partial(preresnet, 110, order, shortcut), CIFAR, shortcut in GATES)
        for order in ORDERS for shortcut in SHORTCUTS
    }  # fmt: skip
    found |= {f"110, {order}, padded": Entry(partial(preresnet, 110, order, projection="pad"), CIFAR) for order in ORDERS}
    found |= {f"{depth}, full": Entry(partial(preresnet, depth), CIFAR) for depth in (164, 1001)}
    return found | {"50, full, ImageNet": Entry(partial(preresnet, 50, stem="imagenet", projection="trunk"), IMAGENET)}


def _resnets() -> dict[str, Entry]:
    found = {f"ResNet-{depth}": Entry(partial(resnet, depth), IMAGENET) for depth in (18, 34, 50, 101, 152)}
    found["ResNeXt-50 32x4d"] = Entry(partial(resnet, 50, groups=32, width_per_group=4), IMAGENET)
    found["Wide ResNet-50-2"] = Entry(partial(resnet, 50, width_per_group=128), IMAGENET)
    shortcuts = ("pad_both", "pad_behind", "projection")
    return found | {
        f"CIFAR ResNet-{d}, {s}": Entry(partial(resnet, d, stem="cifar", shortcut=s), CIFAR) for d in (20, 110) for s in shortcuts
    }


def _wideresnets() -> dict[str, Entry]:
    return {f"WRN-{d}-{w}": Entry(partial(wideresnet, d, w), CIFAR) for d, w in ((16, 4), (28, 10), (40, 2))}


def _vggs() -> dict[str, Entry]:
    # the published classifier reads 7x7 positions, so the input is as large as published
    found = {f"VGG-11{' batch norm' * n}": Entry(partial(vgg, 11, batch_norm=n), (3, 224, 224)) for n in (False, True)}
    small = partial(vgg, batch_norm=True, num_classes=10, classifier=(0,), hidden=(), pooled=1)
    return found | {f"VGG-{d} batch norm, 32x32": Entry(partial(small, d), CIFAR) for d in CONFIGURATIONS}


def _repvggs() -> dict[str, Entry]:
    return {f"RepVGG-{name}": Entry(partial(repvgg, name), IMAGENET, "se" in name) for name in REPVGGS}


def _mobileones() -> dict[str, Entry]:
    return {f"MobileOne-{name}": Entry(partial(mobileone, name), IMAGENET, name == "S4") for name in MOBILEONES}


def _acnets() -> dict[str, Entry]:
    # their average pools have fixed windows, so the inputs are as large as published
    found = {f"CIFAR {name}": Entry(partial(acnet, name), CIFAR) for name in ("cifar-quick", "vgg", "wrn", "cifar-resnet")}
    return {"ResNet-18": Entry(partial(acnet, "resnet", 18), (3, 224, 224))} | found


def _dbbs() -> dict[str, Entry]:
    return {
        "ResNet-18": Entry(partial(dbb, "resnet", depth=18), IMAGENET),
        "ResNet-50": Entry(partial(dbb, "resnet", depth=50), IMAGENET),
        "ResNet-18 of ACBs": Entry(partial(dbb, "resnet", depth=18, block="acb"), IMAGENET),
        "MobileNet": Entry(partial(dbb, "mobilenet"), IMAGENET),
    }  # fmt: skip
