"""Mean and std inside of the network: exact, under the user's names, with inputs, proofs and the manifest in raw pixels."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import foldexport
from foldexport import normalise, probes
from foldexport.errors import EquivalenceError, UsageError
from foldexport.fold.rebuild import in_dtype
from foldexport.normalise import Normalized, Raw, normalized
from foldexport.trace import trace
from foldexport.verify.golden import check_golden, golden, golden_inputs
from tests.command import foldexport as command
from tests.command import save_dirac, save_plain
from tests.statistics import randomise

RAW = {1.0: Raw((0.49, 0.48, 0.45), (0.25, 0.24, 0.26), 1.0), 255.0: Raw((0.49, 0.48, 0.45), (0.25, 0.24, 0.26), 255.0)}
MEAN, STD = "0.5,0.25,0.125", "0.5,0.25,0.2"

PADDED = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, padding=1):
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=padding), nn.BatchNorm2d(4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        )
"""


def network(padding: int) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=padding), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    return randomise(layers, 0).double()


# ---- the network


@pytest.mark.parametrize("top", [1.0, 255.0])
@pytest.mark.parametrize("padding", [0, 1])
def test_it_is_exact(padding, top):
    net, raw = network(padding), RAW[top]
    pixels = top * torch.rand(2, 3, 8, 8, dtype=torch.float64)
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (raw.mean, raw.std))
    wanted = net((pixels / top - mean) / std)
    folded = foldexport.fold(normalized(net, (pixels,), raw), pixels)
    found = folded.module(pixels)
    assert folded.certificate.ok and (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    kept = [entry for entry in folded.ledger if entry.status == "kept"]
    if padding:  # the shift cannot go where zeros are padded: one addition stays, and nothing else
        assert folded.counts_after.get("add") == 1 and "mul" not in folded.counts_after
        assert [entry.module for entry in kept] == ["normalize"] and "zero padding" in kept[0].reason
    else:
        assert not kept and {"add", "mul", "div", "sub"} & folded.counts_after.keys() == set()
        assert {entry.into for entry in folded.ledger if entry.module == "normalize"} == {"0"}


def test_the_user_s_names_stay_and_a_name_that_is_taken_is_left_alone():
    net = network(0)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    plain, behind = trace(net, x), trace(normalized(net, (x,), RAW[1.0]), x)
    added = {"normalize.mean", "normalize.std"}
    assert set(behind.tensors) == set(plain.tensors) | added and behind.raw == RAW[1.0] and plain.raw is None
    modules = [{node.meta.get("module") for node in graph.fx.nodes} for graph in (plain, behind)]
    assert modules[1] - modules[0] == {"normalize"}

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.normalize = network(0)

        def forward(self, x):
            return self.normalize(x)

    own = Own().eval()
    names = {node.meta.get("module") for node in trace(normalized(own, (x,), RAW[1.0]), x).fx.nodes}
    assert {"input_normalize", "normalize.0"} <= names


def test_it_is_left_as_it_was():
    net = network(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    foldexport.fold(normalized(net, (x,), RAW[255.0]), x)
    after = net.state_dict()
    assert set(after) == set(before) and all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("shapes", [[(1, 4, 8, 8)], [(1, 3)], [(1, 3, 8, 8), (1, 3, 8, 8)]])
def test_what_is_no_image_of_as_many_channels_is_refused(shapes):
    with pytest.raises(UsageError, match="the mean has 3 channels; wanted one input"):
        normalized(network(0), tuple(torch.zeros(shape) for shape in shapes), RAW[1.0])


# ---- planted mistakes


def test_a_wrong_deviation_in_the_trace_is_caught(monkeypatch):
    def wrong(graph, module):
        graph = named(graph, module)
        graph.tensors["normalize.std"] = graph.tensors["normalize.std"] * 1.01
        return graph

    named = normalise.named_as_before
    monkeypatch.setattr("foldexport.trace.named_as_before", wrong)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(EquivalenceError):
        foldexport.fold(normalized(network(0), (x,), RAW[1.0]), x)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_wrong_deviation_in_the_fold_is_caught(monkeypatch, padding):
    from foldexport.api import rebuild

    def wrong(folded):
        rebuilt = rebuild(folded)
        with torch.no_grad():
            dict(rebuilt.program.module.named_parameters())["0.weight"][:, 1] *= 1 + 1e-6  # as if std of green were another
        return rebuilt

    monkeypatch.setattr("foldexport.api.rebuild", wrong)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(EquivalenceError, match="`?0`?"):
        foldexport.fold(normalized(network(padding), (x,), RAW[255.0]), x)


def test_a_file_with_another_mean_is_caught():
    x = torch.rand(2, 3, 8, 8)
    net = network(0).float()
    right, wrong = (in_dtype(foldexport.fold(normalized(net, (x,), Raw(mean, RAW[1.0].std, 255.0)), x).module, torch.float32)
                    for mean in (RAW[1.0].mean, (0.49, 0.48, 0.4501)))  # fmt: skip
    graph = trace(normalized(net, (x,), RAW[255.0]).double(), x.double())
    record = golden(lambda *inputs: [graph.module(*inputs)], [[1, 3, 8, 8]], n32=1e-7, raw=RAW[255.0])
    for module, ok in ((right, True), (wrong, False)):
        found = check_golden(record, lambda *arrays, module=module: [module(*map(torch.from_numpy, arrays)).detach().numpy()],
                             format="torch", label="torch")  # fmt: skip
        assert found.ok == ok, found


# ---- inputs


def test_probes_and_golden_inputs_are_raw_and_exact_in_float32():
    x = torch.rand(2, 3, 12, 12)
    graph = trace(normalized(network(1).float(), (x,), RAW[255.0]), x)
    plain = {probe.name: probe.inputs[0] for probe in probes.make(trace(network(1).float(), x))}
    for probe in probes.make(graph):
        (value,) = probe.inputs
        assert torch.equal(value, value.float().double()) and value.shape == plain[probe.name].shape
        if probe.name == "uniform":
            assert value.min() >= 0 and 200 < value.max() < 255
        else:
            seen = graph.module.normalize.double()(value)
            assert (seen - plain[probe.name]).abs().max() < 1e-5, probe.name
    (raw,), (same,) = golden_inputs([[2, 3, 5, 5]], 7, RAW[255.0]), golden_inputs([[2, 3, 5, 5]], 7, Raw(**RAW[255.0].to_dict()))
    assert raw.dtype == torch.float32 and torch.equal(raw, same) and 60 < raw.mean() < 190


# ---- the command


def test_the_command_takes_pixels_as_they_are(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow reads the images")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    checkpoint, arch = save_plain(tmp_path, PADDED)
    words = [checkpoint, "--arch", arch, "--input-shape", "1x3x9x9", "--mean", MEAN, "--std", STD, "--to", "onnx",
             "--data", tmp_path / "images"]  # fmt: skip
    plain, raw = command(*words, "-o", tmp_path / "plain"), command(*words, "--normalize", "255", "-o", tmp_path / "raw")
    assert plain.code == raw.code == 0, plain.err + raw.err
    said = " ".join(raw.out.split())  # the folder's name may break a line anywhere
    assert "inside of the network: it takes pixels from 0 to 255" in said and "RGB from 0 to 255" in said
    fields = [json.loads((tmp_path / name / "net.manifest.json").read_text())["preprocessing"] for name in ("plain", "raw")]
    assert fields[0] == {"mean": [0.5, 0.25, 0.125], "std": [0.5, 0.25, 0.2], "input_size": [3, 9, 9],
                         "value_range": [0.0, 1.0], "color_order": "RGB", "layout": "NCHW"}  # fmt: skip
    assert fields[1]["mean"] == [0, 0, 0] and fields[1]["std"] == [1, 1, 1] and fields[1]["value_range"] == [0, 255]
    assert fields[1]["inside_network"] == {"mean": [0.5, 0.25, 0.125], "std": [0.5, 0.25, 0.2], "value_range": [0.0, 255.0]}
    x = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    mean, std = (np.float32([float(each) for each in text.split(",")]).reshape(3, 1, 1) for text in (MEAN, STD))
    one, other = (onnxruntime.InferenceSession(str(tmp_path / name / "net.onnx"), providers=["CPUExecutionProvider"])
                  .run(None, {"input": fed})[0] for name, fed in (("plain", (x / 255 - mean) / std), ("raw", x)))  # fmt: skip
    np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(one).max())
    assert command("verify", tmp_path / "raw" / "net.manifest.json").code == 0
    path = tmp_path / "raw" / "net.manifest.json"
    path.write_text(path.read_text().replace('"top": 255.0', '"top": 1.0'))
    assert "cannot be drawn again" in command("verify", path).message


def test_a_recognised_checkpoint_knows_its_mean(tmp_path):
    result = command(save_dirac(tmp_path / "small.pth"), "--to", "ts", "--normalize", "--json")
    assert result.code == 0, result.err
    fields = result.document["preprocessing"]
    assert fields["value_range"] == [0, 1] and fields["inside_network"]["mean"] == pytest.approx([0.4914, 0.4824, 0.4467], abs=1e-4)
    assert [entry["module"] for entry in result.document["ledger"] if entry["status"] == "kept"] == ["normalize"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--normalize"], "nothing in the checkpoint says the mean and std of its images: pass --mean and --std"),
        (["--normalize", "--mean", MEAN], "says the std of its images: pass --std"),
        (["--normalize", "--mean", "0.5", "--std", "0.5"], "has 1 numbers, the input 3 channels"),
        (["--mean", "0.5,x"], "wanted a number for each channel"),
        (["--std", "0.5,0,1"], "wanted a number above 0 for each channel"),
        (["--mean", "0.5,nan,1"], "wanted a number for each channel"),
        (["--normalize", "7"], "wanted 1 or 255"),
    ],
)
def test_what_is_missing_or_does_not_fit(tmp_path, words, said):
    checkpoint, arch = save_plain(tmp_path, PADDED)
    result = command(checkpoint, "--arch", arch, "--input-shape", "1x3x9x9", "--to", "onnx", *words)
    assert result.code == 2 and said in result.message.replace("\n", " "), result.message


def test_it_works_without_a_fold_and_on_a_network_that_is_torchscript(tmp_path):
    net = network(1).float()
    torch.jit.trace(net, torch.rand(2, 3, 9, 9)).save(tmp_path / "net.pt")
    common = ["--input-shape", "1x3x9x9", "--mean", MEAN, "--std", STD, "--normalize", "255"]
    assert command(tmp_path / "net.pt", *common, "--to", "onnx", "-o", tmp_path / "a").code == 0
    checkpoint, arch = save_plain(tmp_path, PADDED, "plain")
    result = command(checkpoint, "--arch", arch, *common, "--to", "ts", "--no-fold", "-o", tmp_path / "b")
    assert result.code == 0, result.err
    loaded = torch.jit.load(tmp_path / "b" / "plain.torchscript.pt")
    assert isinstance(Normalized, type) and {"normalize.mean", "normalize.std"} <= dict(loaded.named_buffers()).keys()
