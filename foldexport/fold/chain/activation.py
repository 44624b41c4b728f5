"""Activations over a wide tensor: they bend the branch's channels and leave the carried ones alone."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from foldexport.fold.affine import Affine
from foldexport.fold.chain.carrying import Carried, Wide
from foldexport.fold.chain.network import Claim, Network
from foldexport.fold.chain.plain import Plain
from foldexport.fold.chain.regions import Stage
from foldexport.fold.stored import Stored


def claims_of(network: Network, stored: Stored | None, size: int, plain: Plain | None) -> list[Claim]:
    """The claims of a branch's tensor as the first channels of a wide one."""
    places = torch.arange(size)
    claims = network.whole(stored) if stored is not None else []
    if plain is not None:
        change = Affine.of_vectors(plain.scale, plain.shift, 1, stored.rank) if stored is not None else None
        claims = [claim.moved(change) for claim in claims]
    return [claim.on(places) for claim in claims]


def activated(network: Network, stage: Stage, wide: Wide, plain: Plain | None) -> Wide:
    """The activation over branch and carried channels; these it leaves alone."""
    if stage.activated is None:
        return wide
    stored, carried, size = wide.stored, wide.carried, wide.branch
    extra, like = stored.shape[1] - size, stage.activated
    shape = (1, -1) + (1,) * (stored.rank - 2)
    affine = Affine.identity(stored.rank)
    claims = network.whole(like)
    if plain is not None:
        kind, attrs = "clamp", {"lower": torch.zeros((1,) * stored.rank), "upper": torch.full((1,) * stored.rank, math.inf)}
        attrs = {name: bound.double() for name, bound in attrs.items()}
        affine = Affine.of_vectors(plain.back_scale, plain.back_shift, 1, stored.rank)
        claims = [claim.moved(affine.inverse()) for claim in claims]
        carried = replace(carried, rectified=True, interval=tuple(end.clamp_min(0.0) for end in carried.interval))
    elif stage.slope is not None:
        kind, attrs = "leaky", {"slope": _extended(stage.slope, extra, 1.0).reshape(shape)}
    else:
        kind, (low, high) = "clamp", _harmless(stage, carried)
        attrs = {"lower": _extended(stage.lower, extra, low).reshape(shape),
                 "upper": _extended(stage.upper, extra, high).reshape(shape)}  # fmt: skip
    claims = [claim.on(torch.arange(size)) for claim in claims] + carried.claims(network, carried.places)
    activated = network.emit(like, kind, stored, claims, shape=stored.shape, **attrs)
    activated.op = "relu" if plain is not None else "prelu" if kind == "leaky" else like.op
    return Wide(activated, size, affine, carried)


def _harmless(stage: Stage, carried: Carried) -> tuple[float, float]:
    """Bounds that leave what is carried alone: the branch's own where these are one pair that holds it anyway, else none."""
    low, high = float(stage.lower[0]), float(stage.upper[0])
    uniform = bool((stage.lower == low).all()) and bool((stage.upper == high).all())
    inside = bool((carried.interval[0] >= low).all()) and bool((carried.interval[1] <= high).all())
    return (low, high) if uniform and inside else (-math.inf, math.inf)


def _extended(vector: Tensor, extra: int, value: float) -> Tensor:
    return torch.cat([vector, torch.full((extra,), value, dtype=torch.float64)])
