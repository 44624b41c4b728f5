"""Engines run on a GPU, in the flavour that is installed; elsewhere skipped with the driver's own reason.

    python -m pytest tests/gpu
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import foldexport
from foldexport.errors import CheckpointError
from foldexport.exporters.tensorrt import engine, flavour
from foldexport.exporters.tensorrt.exporter import TensorRTExporter
from foldexport.exporters.tensorrt.options import TensorRTOptions
from foldexport.exporters.tensorrt.profile import Profile
from tests import command
from tests.exporters.tensorrt_parts import Layers, Preactivation
from tests.statistics import randomise

IMAGE = (3, 16, 16)


@pytest.fixture(scope="module", params=["full", "rtx"])
def options(request) -> TensorRTOptions:
    reason = engine.why_not()
    if reason:
        pytest.skip(reason)
    if not flavour.FLAVOURS[request.param].module():
        pytest.skip(f"not installed: {flavour.FLAVOURS[request.param].install}")
    return TensorRTOptions(flavour=request.param)


@pytest.fixture(scope="module")
def folded():
    return foldexport.fold(randomise(Preactivation(), 0), torch.randn(1, *IMAGE))


def _made(folded, path, options, **rest):
    """The engine; where this library does not know this GPU it is built and not run, and the test says so."""
    made = foldexport.export(folded, "tensorrt", path, tensorrt=options, **rest)
    if made.comparison.not_run:
        pytest.skip(made.comparison.not_run)
    return made


def test_engine_computes_the_training_graph(tmp_path, folded, options):
    made = _made(folded, tmp_path / "net.engine", options)
    assert made.comparison.ok and made.comparison.probes >= 8 and made.comparison.noise_multiple < 8
    assert made.comparison.weights_identical[0] == made.comparison.weights_identical[1]


def test_engine_at_every_point_of_its_profile(tmp_path, folded, options):
    profile = Profile(((1, *IMAGE),), ((4, *IMAGE),), ((8, *IMAGE),))
    made = _made(folded, tmp_path / "net.engine", options, profile=profile)
    assert made.comparison.ok and {1, 3} <= set(made.comparison.batches)


def test_every_kind_of_layer(tmp_path, options):
    folded = foldexport.fold(randomise(Layers(), 0), torch.randn(1, *IMAGE))
    assert _made(folded, tmp_path / "net.engine", options).comparison.ok


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_types_are_delivered(precision, tmp_path, folded, options):
    made = _made(folded, tmp_path / "net.engine", options, precision=precision)
    kind = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert made.comparison.ok and made.notes["layer_types"].get(kind, 0) >= 2


def test_a_wrong_engine_is_caught(tmp_path, folded, options, monkeypatch):
    """Planted: the engine's outputs are off by one part in a thousand."""
    from foldexport.errors import EquivalenceError

    _made(folded, tmp_path / "right.engine", options)
    plain = engine.Engine.run
    monkeypatch.setattr(engine.Engine, "run", lambda self, *arrays: [each * np.float32(1.001) for each in plain(self, *arrays)])
    with pytest.raises(EquivalenceError, match="times the training graph's float32 noise"):
        foldexport.export(folded, "tensorrt", tmp_path / "net.engine", tensorrt=options)
    assert command.files(tmp_path) == ["right.engine"]


def test_the_command_and_verify(tmp_path, options):
    checkpoint, arch = command.save_plain(tmp_path)
    asked = ("--to", "tensorrt", "--flavour", options.flavour, "-o", tmp_path / "out", "--json")
    ran = command.foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x16x16", *asked)
    assert ran.code == 0, ran.err
    if ran.document["artifacts"][0]["comparison"]["not_run"]:
        pytest.skip(ran.document["artifacts"][0]["comparison"]["not_run"])
    assert command.foldexport("verify", tmp_path / "out" / "net.manifest.json").code == 0
    (tmp_path / "out" / "net.manifest.json").unlink()
    with pytest.raises(CheckpointError, match="executable code"):
        TensorRTExporter().load(tmp_path / "out" / "net.engine")


def test_timing_cache_of_full_tensorrt(tmp_path, folded, options, monkeypatch):
    if options.flavour != "full":
        pytest.skip("TensorRT-RTX measures nothing when it builds")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = _made(folded, tmp_path / "a.engine", options)
    second = _made(folded, tmp_path / "b.engine", options)
    assert first.notes["timing_cache"] == "empty" and second.notes["timing_cache"].endswith("bytes used")
    assert len(os.listdir(tmp_path / "cache" / "foldexport" / "tensorrt")) == 1
