"""The shipped table: what it says of the packages holds, and what its fingerprints mean."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
from torch import nn

from foldexport import zoo
from foldexport.fingerprints.data import parsed, table
from foldexport.fingerprints.table import Candidate, Dimension, fingerprint, solve, with_count
from tests.fingerprints.networks import network, same_outputs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import fingerprint_functions
import fingerprint_networks
import fingerprints as tool

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
KIB = 1024
SHAPES = {"a.weight": (4, 3, 1, 1), "a.num_batches_tracked": (), "fc.weight": (10, 4), "fc.bias": (10,)}
HEAD = (Dimension("fc.bias", 0), Dimension("fc.weight", 0))


def row_of(spec: str):
    return next(row for row in table().rows.values() if any(Candidate(spec) in each for each in row.functions))


def test_it_is_small_and_of_the_tested_versions():
    file = resources.files("foldexport.fingerprints") / "table.json"
    assert len(file.read_bytes()) < 500 * KIB
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and ";" not in line)
    for package, version in table().versions.items():
        assert pinned[package] == version, f"run tools/fingerprints.py with {package} {pinned[package]}"


def test_a_fingerprint_does_not_depend_on_counters_order_and_classes():
    key = fingerprint(SHAPES, HEAD)
    assert key == fingerprint(dict(reversed(SHAPES.items())), HEAD)
    assert key == fingerprint({name: shape for name, shape in SHAPES.items() if "num" not in name}, HEAD)
    assert key == fingerprint(with_count(SHAPES, HEAD, 77), HEAD)
    assert key != fingerprint({**SHAPES, "fc.weight": (10, 5)}, HEAD)
    assert key != fingerprint({**SHAPES, "fc2.weight": (10, 5)}, HEAD)
    assert len({fingerprint(SHAPES), fingerprint(with_count(SHAPES, HEAD, 77))}) == 2


def test_a_count_is_what_all_dimensions_agree_on():
    assert solve(HEAD, SHAPES) == 10
    assert solve(HEAD, {**SHAPES, "fc.bias": (11,)}) is None
    assert solve((*HEAD, Dimension("box.bias", 0, 4, 4)), {**SHAPES, "box.bias": (44,)}) == 10
    assert solve((Dimension("box.bias", 0, 4, 4),), {"box.bias": (45,)}) is None
    assert solve((Dimension("absent", 0),), SHAPES) is None


@pytest.mark.parametrize("spec", [
    "torchvision.models:resnet50", "torchvision.models:mobilenet_v3_large", "torchvision.models.video:s3d", "timm.models:dla34",
    "timm.models:efficientnet_b0", "timm.models:tf_efficientnet_b0", "timm.models:repvgg_b1", "timm.models:nf_resnet50",
])  # fmt: skip
def test_networks_have_the_fingerprints_of_the_table(spec):
    candidate = Candidate(spec)
    usual, other = (tool.shapes(candidate, num_classes=count) for count in (1000, 7))
    key = next(key for key, row in table().rows.items() if any(candidate in each for each in row.functions))
    for shapes, count in ((usual, 1000), (other, 7)):
        assert fingerprint(shapes, table().rows[key].relation) == key
        assert solve(table().rows[key].relation, shapes) == count


@pytest.mark.parametrize("specs, functions", [
    (("torchvision.models:resnet50", "timm.models:resnet50"), 1),
    (("timm.models:resnet50", "timm.models:resnetaa50", "timm.models:resnetblur50"), 3),
    (("timm.models:mobilenetv3_small_100", "timm.models:tf_mobilenetv3_small_100"), 2),
    (("torchvision.models:densenet121", "timm.models:densenet121"), 1),
])  # fmt: skip
def test_functions_of_the_table_are_those_of_the_networks(specs, functions):
    candidates = [Candidate(spec) for spec in specs]
    found, _, doubts = fingerprint_functions.functions(candidates, tool.shapes(candidates[0]), False)
    assert len(found) == functions and not doubts
    row = row_of(specs[0])
    placed = [next(place for place, each in enumerate(row.functions) if candidate in each) for candidate in candidates]
    assert [sorted(Counter(placed).values())] == [sorted(map(len, found))]


def test_the_generator_writes_what_is_shipped():
    names = ("squeezenet1_1", "mnasnet0_5", "lcnet_050", "tinynet_e")
    every = itertools.chain(fingerprint_networks.of_torchvision(), fingerprint_networks.of_timm())
    offers = [each for each in every if each.name in names]
    groups: dict[str, tool.Group] = {}
    complaints: list[str] = []
    for offer in offers:
        for candidate in offer.variants:
            tool.add(offer, candidate, groups, complaints)
    made = parsed(json.loads(tool.lines(tool.document(groups, offers, complaints))))
    assert not complaints and len(made.rows) == len(names)
    assert made.rows == {key: table().rows[key] for key in made.rows}
    assert made.headless == {key: table().headless[key] for key in made.headless}
    for package, networks in made.published.items():
        assert networks == {name: table().published[package][name] for name in networks}
    assert made.files.items() <= table().files.items()


def test_what_was_settled_before_may_be_kept(monkeypatch):
    key, row = next((key, row) for key, row in table().rows.items() if len(row.functions) > 1)
    candidates = [each for members in row.functions for each in members]

    def planted(*arguments, **counts):
        raise LookupError("ran")

    monkeypatch.setattr(tool, "functions", planted)
    kept, zoo_place, doubts = tool.settle(key, tool.Group(row.relation, {}, candidates=candidates), table())
    assert (tuple(map(tuple, kept)), zoo_place, doubts) == (row.functions, row.zoo, [])
    other = [*candidates[1:], Candidate("timm.models:new")]
    for others, known in ((candidates[1:], table()), (other, table()), (candidates, None)):
        with pytest.raises(LookupError):
            tool.settle(key, tool.Group(row.relation, {}, candidates=others), known)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "wide_resnet50_2"])
def test_the_zoo_computes_what_the_table_says(name):
    row = row_of(f"torchvision.models:{name}")
    assert row.zoo is not None and Candidate(f"torchvision.models:{name}") in row.functions[row.zoo]
    theirs = network("torchvision", name, num_classes=3)
    assert same_outputs(zoo.identify(theirs.state_dict()).module, theirs, (3, 64, 64))


def test_every_row_is_whole():
    for key, row in table().rows.items():
        assert len(key) == 16 and row.functions and all(row.functions)
        assert row.zoo is None or -1 <= row.zoo < len(row.functions)
        for candidate in (each for members in row.functions for each in members):
            published = table().published[candidate.package][candidate.name]
            assert all(len(each.inputs.mean) == len(each.inputs.std) == 3 for each in published)
    for file in table().files.values():
        assert any(each.tag == file.tag for each in table().published[file.package][file.name])
    assert all(whole in table().rows for each in table().headless.values() for whole in each)


def test_relations_need_whole_factors():
    assert tool.relation({"a": (10,)}, {"a": (12,)}, 10, 12) == (Dimension("a", 0, 1, 0),)
    assert tool.relation({"a": (44, 3)}, {"a": (52, 3)}, 10, 12) == (Dimension("a", 0, 4, 4),)
    for other in ({"a": (13,)}, {"a": (8,)}, {"b": (12,)}, {"a": (12, 1)}):
        with pytest.raises(ValueError):
            tool.relation({"a": (10,)}, other, 10, 12)


def test_a_planted_difference_is_another_function():
    """The comparison sees a batch norm's eps, which changes outputs by a few millionths."""
    sizes = [(64, 64)]
    candidate = Candidate("timm.models:resnet18d")
    state = fingerprint_functions.random_state(fingerprint_functions.build(candidate), sizes)

    def with_eps(eps: float) -> nn.Module:
        made = fingerprint_functions.build(candidate)
        made.layer1[0].bn1.eps = eps
        return made

    usual, again, other = (
        fingerprint_functions.Sample(functools.partial(with_eps, eps), state, sizes) for eps in (1e-5, 1e-5, 2e-5)
    )
    assert fingerprint_functions._same(usual, again, "", [])
    assert not fingerprint_functions._same(usual, other, "", [])
