"""The comparison of artifact and training graph sees planted mistakes, and nothing where there is none."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from foldexport import artifact, verify
from foldexport.errors import EquivalenceError
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.torchscript.exporter import TorchScriptExporter
from foldexport.exporters.weights import expected_weights, match_weights
from tests.exporters import networks
from tests.exporters.networks import IMAGE, N32

EXAMPLE = (torch.zeros(1, *IMAGE),)


def planted(base: type, spoil) -> object:
    """An exporter that writes a spoilt copy of the module that it is given."""

    class Planted(base):
        def export(self, module, example, path, options=None, **more):
            wrong = copy.deepcopy(module)
            with torch.no_grad():
                spoil(wrong)
            return super().export(wrong, example, path, options, **more)

    return Planted()


def produce(exporter, module: nn.Module, folder: Path, with_weights: bool = True):
    """Export, prove and place, as the pipeline does."""
    inputs = networks.probes(IMAGE)

    def prove(path: Path):
        weights = match_weights(expected_weights(module), exporter.weights(path)) if with_weights else None
        return verify.require(networks.proof(exporter, module, inputs, path, weights))

    return artifact.write(exporter, module, EXAMPLE, folder / f"net{exporter.suffix}", ExportOptions(), prove=prove)


def add_1e6(module):
    module[3].weight[1, 2, 0, 0] += 1e-6


def one_ulp(module):
    weight = module[0].weight.view(-1)
    weight[5] = torch.nextafter(weight[5], torch.tensor(math.inf))


def drop_bias(module):
    module[0].bias = None


def wrong_stride(module):
    module[3].stride = (2, 2)


def wrong_padding_mode(module):
    module[3].padding_mode = "circular"
    module[3]._reversed_padding_repeated_twice = [1, 1, 1, 1]


def swap_rows(module):
    module[9].weight.copy_(module[9].weight.flip(0))


BASES = [OnnxExporter, TorchScriptExporter]


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
@pytest.mark.parametrize(
    "spoil", [add_1e6, one_ulp, drop_bias, wrong_stride, wrong_padding_mode, swap_rows], ids=lambda each: each.__name__
)
def test_a_mistake_in_an_exporter_leaves_no_file(base, spoil, tmp_path):
    with pytest.raises(EquivalenceError) as caught:
        produce(planted(base, spoil), networks.chain(), tmp_path)
    assert caught.value.exit_code == 4 and "no file was written" in str(caught.value) and base.name in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil", [drop_bias, wrong_stride, wrong_padding_mode, swap_rows], ids=lambda each: each.__name__
)
def test_the_outputs_alone_show_gross_mistakes(spoil, tmp_path):
    with pytest.raises(EquivalenceError, match="allowed|does not run|has shape"):
        produce(planted(TorchScriptExporter, spoil), networks.chain(), tmp_path, with_weights=False)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_what_the_outputs_of_a_deep_network_hide_the_weights_show(base, tmp_path):
    module = networks.deep()

    def shifted(wrong):
        wrong[0].bias[0] += 0.5

    blind = produce(planted(base, shifted), module, tmp_path, with_weights=False)
    assert blind.comparison.ok and not blind.comparison.message
    (tmp_path / "again").mkdir()
    with pytest.raises(
        EquivalenceError, match=r"1 of 124 weights differ from the module's in their bits: 0\.bias; no file"
    ):
        produce(planted(base, shifted), module, tmp_path / "again")
    assert not list((tmp_path / "again").iterdir())


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_no_mistake_no_finding(base, tmp_path):
    module = networks.chain()
    made = produce(base(), module, tmp_path)
    found = made.comparison
    assert found.ok and not found.message and not found.warning and found.noise_multiple < verify.WARN_ABOVE
    assert found.weights_identical == (7, 7) and found.probes == 2 and found.batches == (1, 3)
    assert (
        made.path.exists()
        and made.sha256 == {made.path.name: artifact.sha256(made.path)}
        and made.size_bytes[made.path.name] > 0
    )
    assert str(found).startswith(f"✓ {base.name}  ") and str(found).endswith("weights 7/7 bit-identical")


def compared(error: float, shape=(2, 8, 16, 16), at=None, n32=N32, **options) -> verify.Comparison:
    """A reference of peak 1 and an output that is off by ``error``: everywhere with random signs, or in one place."""
    generator = np.random.default_rng(3)
    reference = generator.uniform(-1, 1, shape)
    reference.reshape(-1)[0] = 1.0
    difference = np.zeros(shape)
    difference[at if at is not None else ...] = error
    signs = generator.choice([-1, 1], shape)
    output = reference + signs * difference
    probe = (torch.zeros(shape[0], 3),)
    return verify.compare(
        [[torch.from_numpy(reference)]],
        lambda _: [output],
        [probe],
        n32,
        format="onnx",
        label="onnxruntime 1.2.3",
        **options,
    )


@pytest.mark.parametrize(
    ("times", "ok", "warns"),
    [(1, True, False), (3.9, True, False), (4.1, True, True), (7.9, True, True), (8.1, False, True)],
)
def test_noise_everywhere_is_measured_by_its_rms(times, ok, warns):
    found = compared(times * N32)
    assert found.noise_multiple == pytest.approx(times) and found.max_error == pytest.approx(times * N32)
    assert (found.ok, bool(found.message)) == (ok, warns)


def test_one_wrong_element_counts_in_full():
    found = compared(1e-5, at=(1, 5, 3, 3))
    assert not found.ok and found.worst == "output 'output', channel 5" and found.max_error == pytest.approx(1e-5)
    with pytest.raises(EquivalenceError) as caught:
        verify.require(found)
    assert str(caught.value) == (
        "onnx, run by onnxruntime 1.2.3: error 1.0e-05 of peak, 41.1 times the training graph's float32 noise "
        "(8 allowed), at output 'output', channel 5; no file was written."
    )


def test_a_faultless_float32_run_is_not_warned_about():
    """The largest of many errors is several times their RMS; that is no finding."""
    torch.manual_seed(0)
    module = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()))).eval()
    inputs = networks.probes((16, 48, 48))
    wanted = networks.references(module, inputs)
    with torch.no_grad():
        errors = [
            (module(*probe).double() - refs[0]) / refs[0].abs().max()
            for probe, refs in zip(inputs, wanted, strict=True)
        ]
    n32 = float(torch.cat([error.flatten() for error in errors]).square().mean().sqrt())
    found = verify.compare(
        wanted, lambda x: [module(torch.from_numpy(x)).detach().numpy()], inputs, n32, format="f", label="r"
    )
    assert found.max_error > 6 * n32 and found.ok and not found.message and found.noise_multiple < 2.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails(value):
    found = compared(value, at=(0, 2, 0, 0))
    assert not found.ok and "channel 2" in found.message
    assert found.to_dict()["max_error"] is None


def test_the_noise_has_a_floor():
    assert compared(3 * N32, n32=0.0).ok


def test_noise_may_be_given_per_output():
    reference = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(4, 16)
    outputs = [(reference + 1e-5).numpy(), (reference + 1e-8).numpy()]
    probe = [(torch.zeros(4, 3),)]
    options = {"format": "f", "label": "r", "output_names": ["rough", "fine"]}
    assert verify.compare([[reference] * 2], lambda _: outputs, probe, [1e-5, 1e-8], **options).ok
    found = verify.compare([[reference] * 2], lambda _: outputs, probe, [1e-8, 1e-8], **options)
    assert not found.ok and found.worst.startswith("output 'rough'")


def scores(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def top1(reference: torch.Tensor, output: torch.Tensor, n32: float = N32) -> verify.Comparison:
    probe = (torch.zeros(len(reference), 3),)
    return verify.compare([[reference]], lambda _: [output.numpy()], [probe], n32, format="f", label="r")


def test_top1_counts_clear_samples_and_lists_near_ties():
    reference = scores([1.0, 0.2, 0.1], [0.3, 0.3 + 1e-9, 0.0])
    found = top1(reference, scores([1.0, 0.2, 0.1], [0.3 + 1e-9, 0.3, 0.0]))
    assert (found.top1.agree, found.top1.counted) == (1, 1) and found.ok
    assert found.top1.near_ties == [{"probe": 0, "sample": 1, "classes": [1, 0], "margin": pytest.approx(1e-9)}]
    assert "top-1 1/1 (1 near-ties)" in str(found)


def test_a_clear_class_that_changes_fails():
    """Just inside of what is allowed as an error, yet the class is another."""
    margin = 2.2 * verify.WARN_ABOVE * N32
    found = top1(scores([1.0, 1.0 - margin, 0.0]), scores([1.0 - 0.6 * margin, 1.0 - 0.4 * margin, 0.0]))
    assert (
        found.noise_multiple < verify.FAIL_ABOVE
        and not found.ok
        and "1 of 1 clear top-1 classes differ" in found.message
    )


def test_maps_have_no_top1():
    assert compared(N32).top1 is None


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([np.zeros((2, 3))], r"output 'output' has shape \[2, 3\], the training graph's \[2, 4\]"),
        ([np.zeros((2, 4))] * 2, "it has 2 outputs, the training graph 1"),
    ],
)
def test_wrong_shapes_and_counts(output, message):
    probe = (torch.zeros(2, 3),)
    found = verify.compare(
        [[torch.zeros(2, 4, dtype=torch.float64)]], lambda _: output, [probe], N32, format="f", label="r"
    )
    assert not found.ok
    with pytest.raises(EquivalenceError, match=message):
        verify.require(found)


def test_a_runtime_that_fails():
    def broken(_):
        raise RuntimeError("first line\nthe dimension 3 is not 2")

    found = verify.compare([[torch.zeros(3, 4)]], broken, [(torch.zeros(3, 5),)], N32, format="f", label="r")
    assert not found.ok and found.message == "it does not run on an input of 3x5: the dimension 3 is not 2"


@pytest.mark.parametrize(("differing", "ok"), [(1, True), (3, False)])
def test_maps_of_classes_may_differ_in_near_ties_only(differing, ok):
    reference = torch.zeros(1, 100, 200, dtype=torch.int64)
    output = reference.numpy().copy()
    output.reshape(-1)[:differing] = 1
    found = verify.compare([[reference]], lambda _: [output], [(torch.zeros(1, 3),)], N32, format="f", label="r")
    assert found.ok is ok and ("differs in 3 of 20000" in found.message) is not ok


def test_a_weight_by_its_own_name_must_be_there():
    expected = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    assert match_weights(expected, {"x": np.float32([1, 2]), "y": np.float32([[3], [4]])}).ok
    swapped = match_weights(expected, {"a": np.float32([3, 4]), "b": np.float32([1, 2])})
    assert swapped.missing == ("a", "b") and str(swapped) == "weights 0/2 bit-identical"
    negative = match_weights({"z": torch.tensor([-0.0, 1.0])}, {"z": np.float32([0.0, 1.0])})
    assert not negative.ok, "a zero of the other sign has other bits"


def test_scalars_and_counters_are_not_compared():
    module = nn.BatchNorm2d(3)
    module.register_buffer("scale", torch.tensor(0.5))
    assert list(expected_weights(module)) == ["weight", "bias", "running_mean", "running_var"]


def test_a_tolerance_of_the_user_takes_the_place_of_the_noise():
    loose, tight = verify.Tolerance(relative=1e-4), verify.Tolerance(absolute=1e-9)
    assert compared(1e-5, tolerance=loose).ok and not compared(1e-5).ok
    found = compared(N32, tolerance=tight)
    assert compared(N32).ok and not found.ok and "(allowed: 1e-09)" in found.message
    assert not compared(math.nan, at=(0, 0, 0, 1), tolerance=loose).ok


# ---- probes on which the network itself is badly conditioned


def units_of(error: float, there: float, probes: int = 2) -> verify.Comparison:
    """A file that is off by ``error`` of the peak on the last probe, where the noise is ``there`` and 1e-7 elsewhere."""
    generator = torch.Generator().manual_seed(0)
    wanted = [torch.randn(1, 1000, generator=generator, dtype=torch.float64) for _ in range(probes)]
    off = [each + (error * each.abs().max() if place == probes - 1 else 0.0) for place, each in enumerate(wanted)]
    outputs = iter(off)
    return verify.compare(
        [[each] for each in wanted], lambda *_: [next(outputs).numpy()], [()] * probes, 1e-7, format="f", label="l",
        noise_there=lambda place: [[there]],
    )  # fmt: skip


def test_a_probe_that_reads_high_is_read_in_its_own_noise():
    assert not units_of(1e-5, 1e-7).ok, "a probe like the others has the usual unit"
    found = units_of(3e-6, 2e-6)
    assert found.ok and found.noise_multiple == pytest.approx(1.5, rel=0.01) and found.units == {1: [2e-6]} and found.probes == 2
    assert units_of(3e-7, 2e-6).units == {}, "nobody asks where the usual unit reads below the warning"
    assert not units_of(3e-5, 2e-6).ok, "a mistake"


def test_a_probe_that_shows_nothing_fails_and_does_not_prove():
    found = units_of(3e-5, 1e-5)
    assert found.ok and found.left_out == ["1"] and found.probes == 1
    assert not units_of(1e-3, 1e-5).ok, "wrong in any unit"
    alone = units_of(3e-5, 1e-5, probes=1)
    assert not alone.ok and "no input that shows anything" in alone.message


# ---- maps of classes


def classes_differing(share: float, runs: int = 4, allowed: float | None = None) -> verify.Comparison:
    """A map of 10,000 classes per run, of which the first run differs in ``share`` of all."""
    wanted = [torch.zeros(1, 100, 100, dtype=torch.int64) for _ in range(runs)]
    found = [each.numpy().copy() for each in wanted]
    found[0].reshape(-1)[: round(share * runs * 10_000)] = 1
    outputs = iter(found)
    discrete = None if allowed is None else [verify.allowed_share(allowed)]
    return verify.compare([[each] for each in wanted], lambda: [next(outputs)], [()] * runs, 1e-7, format="f", label="l",
                          discrete=discrete)  # fmt: skip


def test_classes_are_counted_over_all_probes():
    assert classes_differing(1e-4).ok and not classes_differing(2e-4).ok
    assert classes_differing(7e-3, allowed=1e-3).ok and not classes_differing(9e-3, allowed=1e-3).ok
    assert not classes_differing(0.3 / 4, runs=4, allowed=0.0).ok and verify.allowed_share(0.9) == verify.DISCRETE_MOST
