"""int8: ranges equalised exactly, every layer quantised, quality judged by accuracy, calibration on the user's samples only."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import foldexport
from foldexport import interpret, samples
from foldexport.errors import EquivalenceError, PrecisionError, UsageError
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.precision import equalise, int8
from foldexport.precision.quantised import half_a_step
from tests.command import files, save_dirac, save_plain, tiny
from tests.command import foldexport as command
from tests.precision.networks import Trunk, folded

EXAMPLE = (torch.randn(1, 3, 8, 8),)
PREPROCESSING = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


class Uneven(nn.Module):
    """Hidden channels from 2^-5 to 2^5 that count alike: without equalisation the small ones are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)
        spread = 2.0 ** torch.linspace(-5, 5, 16)
        with torch.no_grad():
            self.first.weight.mul_(spread[:, None, None, None]), self.first.bias.mul_(spread)
            self.second.weight.div_(spread[None, :, None, None])

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def data(count: int = 64, seed: int = 0) -> list[np.ndarray]:
    return [torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).numpy()]


@pytest.fixture(scope="module")
def uneven():
    torch.manual_seed(0)
    return foldexport.fold(Uneven().eval(), torch.randn(2, 3, 8, 8))


def quality(found, path, **options) -> int8.Quality:
    _, _, info = int8.quantise(found.refold().module, EXAMPLE, path, data(), ExportOptions(), **options)
    given = int8.Samples(data(), data(seed=1), None)
    return int8.judge(OnnxExporter().load(path), lambda inputs: interpret.outputs(found.graph, inputs, torch.float32), given, info)


def test_equal_ranges_bring_back_what_a_common_step_loses(uneven, tmp_path):
    plain = quality(uneven, tmp_path / "plain.onnx", equalise=False)
    equal = quality(uneven, tmp_path / "equal.onnx")
    assert equal.sqnr_db > plain.sqnr_db + 3 and equal.sqnr_db > 20
    assert equal.equalised_groups >= 10 and equal.proved_values >= 5 and plain.equalised_groups == 0


def test_a_channel_that_is_not_compensated_is_found(uneven, monkeypatch):
    def wrong(*given):
        changed = plain(*given)
        with torch.no_grad():
            changed.get_submodule("second").weight[:, 3].mul_(2.0)
        return changed

    plain = equalise.rescaled
    monkeypatch.setattr(equalise, "rescaled", wrong)
    with pytest.raises(EquivalenceError, match="'second'.*was not compensated"):
        equalise.equalised(uneven.refold().module, [tuple(torch.as_tensor(a).double() for a in data(8))])


def test_every_layer_is_quantised_and_bytes_are_stable(tmp_path):
    found = folded(Trunk)
    paths = [tmp_path / "one.onnx", tmp_path / "two.onnx"]
    for path in paths:
        _, module, _ = int8.quantise(found.refold().module, EXAMPLE, path, data(32), ExportOptions())
    read = int8.require_int8(OnnxExporter(), paths[0])
    assert set(read.layers) == {"int8"} and read.share("int8") > 0.5
    assert paths[0].read_bytes() == paths[1].read_bytes()
    arrays = OnnxExporter().weights(paths[0])
    match = half_a_step(module, arrays)
    assert match.ok and match.total >= 4
    name = next(name for name in arrays if name.endswith(".weight_quantized"))
    arrays[name] = arrays[name].copy()
    arrays[name].reshape(-1)[0] += 1
    assert half_a_step(module, arrays).missing == (name.removesuffix("_quantized"),)


def test_a_layer_left_in_float32_is_refused(tmp_path):
    path = tmp_path / "net.onnx"
    OnnxExporter().export(folded(Trunk).module, EXAMPLE, path)
    with pytest.raises(PrecisionError, match="asked for int8, but 6 of 6 layers") as caught:
        int8.require_int8(OnnxExporter(), path)
    assert caught.value.exit_code == 6


def found(**changes) -> int8.Quality:
    given = {"sqnr_db": 30.0, "agreement": 0.99, "accuracy_before": None, "accuracy_after": None, "samples": 100}
    return int8.Quality(**{**given, "calibration_samples": 10, "equalised_groups": 0, "proved_values": 0, **changes})


def test_what_is_allowed():
    labelled = {"accuracy_before": 0.90, "accuracy_after": 0.885}
    int8.require_quality(found(), None)
    int8.require_quality(found(**labelled), 2.0)
    for wrong, allowed, said in (
        (found(agreement=0.97), None, "differs on 3.0% of 100 samples"),
        (found(agreement=None, sqnr_db=15.0), None, "20 dB wanted"),
        (found(agreement=None, sqnr_db=float("nan")), None, "20 dB wanted"),
        (found(**labelled), None, "falls by 1.50 points"),
    ):
        with pytest.raises(EquivalenceError, match=said) as caught:
            int8.require_quality(wrong, allowed)
        assert caught.value.exit_code == 4
    with pytest.raises(UsageError, match="has no labels"):
        int8.require_quality(found(), 1.0)


def test_what_calibrates_does_not_judge():
    numbers = [np.arange(1000.0)]
    parts = int8.split(numbers, np.arange(1000))
    assert not set(parts.calibration[0]) & set(parts.judged[0])
    assert len(parts.calibration[0]) == int8.CALIBRATION_SAMPLES and (parts.labels == parts.judged[0]).all()
    few = int8.split([np.arange(10.0)], None)
    assert len(few.calibration[0]) == len(few.judged[0]) == 10


def test_labels_are_folders_or_an_array(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for place in range(6):
            image.new("RGB", (8, 8), (place, 0, 0)).save(tmp_path / "images" / name / f"{place}.png")
    arrays, labels = samples.labelled(tmp_path / "images", PREPROCESSING, 4)
    assert arrays[0].shape == (4, 3, 8, 8) and labels.values.tolist() == [0, 0, 1, 1] and labels.classes == 2
    image.new("RGB", (8, 8)).save(tmp_path / "images" / "alone.png")
    assert samples.labelled(tmp_path / "images", PREPROCESSING, 4)[1].values is None
    np.savez(tmp_path / "with.npz", x=np.zeros((5, 3, 8, 8), np.float32), labels=np.arange(5))
    arrays, labels = samples.labelled(tmp_path / "with.npz", {}, 3)
    assert len(arrays) == 1 and labels.values.tolist() == [0, 1, 3] and labels.classes == 5
    assert len(samples.load(tmp_path / "with.npz", {})) == 1
    np.savez(tmp_path / "wrong.npz", x=np.zeros((5, 3, 8, 8), np.float32), labels=np.zeros(5))
    with pytest.raises(UsageError, match="one class number per sample"):
        samples.labelled(tmp_path / "wrong.npz", {}, 3)


SCORES = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64, 10, bias=False),
        )
"""


def save_data(path, network, size: int, spoilt: bool = False):
    """Samples whose labels are the network's own classes; spoilt: those that calibrate are tiny."""
    images = torch.randn(200, 3, size, size, generator=torch.Generator().manual_seed(5))
    if spoilt:
        images[::2] *= 1e-3
    with torch.no_grad():
        labels = network.eval()(images).argmax(1)
    np.savez(path, images=images.numpy(), labels=labels.numpy())
    return path


def test_the_command(tmp_path):
    checkpoint, given = save_dirac(tmp_path / "dirac.pth"), save_data(tmp_path / "data.npz", tiny(), 32)
    done = command(checkpoint, "--to", "onnx", "-o", tmp_path / "out", "--precision", "int8", "--data", given, "--max-drop", "20")
    assert done.code == 0, done.err
    assert "SQNR" in done.out and "accuracy 100.00% →" in done.out and "to half a step" in done.out
    record = json.loads((tmp_path / "out" / "dirac.manifest.json").read_text())
    assert record["precision"]["quality"]["drop_points"] <= 20 and record["precision"]["other_quality"]["samples"] == 100
    assert set(record["artifacts"][0]["notes"]["precision"]["layers"]) == {"int8"}
    assert files(tmp_path / "out") == ["dirac.manifest.json", "dirac.onnx"]
    assert command("verify", tmp_path / "out" / "dirac.manifest.json").code == 0


def test_an_accuracy_that_falls_leaves_no_file(tmp_path):
    checkpoint, arch = save_plain(tmp_path, SCORES)
    given = save_data(tmp_path / "data.npz", foldexport.load(checkpoint, arch=arch), 8, spoilt=True)
    words = ("--arch", arch, "--to", "onnx", "-o", tmp_path / "out", "--precision", "int8", "--data", given)
    done = command(checkpoint, *words)
    assert done.code == 4 and "accuracy falls by" in done.message, (done.out, done.err)
    assert files(tmp_path) == ["data.npz", "net.pth", "net.py"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "onnx", "--precision", "int8"), "needs --data"),
        (("--to", "onnx,ts", "--precision", "int8"), "ONNX only"),
        (("--to", "onnx", "--precision", "fp16", "--max-drop", "1"), "--max-drop: is about int8"),
        (("--to", "onnx", "--precision", "int8", "--max-drop", "-1"), "wanted points"),
    ],
    ids=["no data", "another format", "not int8", "negative"],
)
def test_refusals(words, said, tmp_path):
    checkpoint = save_dirac(tmp_path / "dirac.pth")
    done = command(checkpoint, "-o", tmp_path / "out", *words)
    assert done.code == 2 and said in done.message and files(tmp_path) == ["dirac.pth"]
