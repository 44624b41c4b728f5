"""Plain PyTorch source: short, its own owner's, bit-identical, and nothing in it but a network."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from foldexport import api, artifact
from foldexport.errors import EquivalenceError, PrecisionError, UsageError
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.pytorch import checked, exporter, layers, source
from foldexport.exporters.weights import expected_weights, match_weights
from tests.exporters import networks
from tests.exporters.networks import IMAGE
from tests.exporters.test_onnx import EXPORT_SCRIPT
from tests.statistics import randomise

EXPORTER = exporter.PyTorchExporter()
EXAMPLE = (torch.zeros(2, *IMAGE),)
BATCH = [{0: "batch"}]


class Block(nn.Module):
    def __init__(self, size: int, more: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(size, more, 3, stride, 1, bias=False), nn.BatchNorm2d(more)
        self.conv2, self.bn2 = nn.Conv2d(more, more, 3, 1, 1, bias=False), nn.BatchNorm2d(more)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(size, more, 1, stride, bias=False), nn.BatchNorm2d(more))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """The structure of ResNet-18."""

    def __init__(self, width: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        for place in range(4):
            size, more = width * 2 ** max(place - 1, 0), width * 2**place
            rest = [Block(more, more, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{place + 1}", nn.Sequential(Block(size, more, 1 if place == 0 else 2), *rest))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Many(nn.Module):
    """Two inputs, three outputs, clamps per channel, sums, products, slices, concatenations, sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up = nn.Conv2d(12, 8, 1)
        self.gate = nn.Linear(5, 8)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        a = self.bn1(F.relu(self.conv1(self.norm(image))))
        b = self.bn2(F.relu(self.conv2(a))) + a  # the scale of a value with two readers stays a clamp
        low, high = b.chunk(2, 1)
        c = torch.cat([low * torch.sigmoid(high), F.max_pool2d(b, 3, 1, 1)], 1)
        c = self.up(F.interpolate(c, scale_factor=2.0, mode="bilinear"))
        d = c * self.gate(vector)[:, :, None, None] - (1.0 - c[:, :, 1:-1].mean((2, 3), keepdim=True))
        return d.permute(0, 2, 3, 1), {"b": b, "flat": d.reshape(d.shape[0], -1)[:, :7]}


def folded(module: nn.Module, *shapes: tuple[int, ...]) -> api.Folded:
    randomise(module, seed=3)
    return api.fold(module, tuple(torch.randn(2, *shape) for shape in shapes))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(module, path) of an exported chain."""
    path = tmp_path_factory.mktemp("chain") / "net.py"
    notes = EXPORTER.export(networks.chain(), EXAMPLE, path)
    assert notes == {"inputs": ["input"], "outputs": ["output"]}
    return networks.chain(), path


def compared(module: nn.Module, path: Path, *shapes: tuple[int, ...]):
    match = match_weights(expected_weights(module), EXPORTER.weights(path))
    return networks.proof(EXPORTER, module, networks.probes(*shapes), path, match)


def test_a_chain_is_one_sequential(chain):
    module, path = chain
    text = path.read_text()
    assert text.count("nn.Sequential(") == 1 and "class" not in text and "import torch\n" not in text
    assert "    nn.MaxPool2d(2),\n" in text and "    nn.Conv2d(16, 8, 1, groups=2),\n" in text
    assert "x: [batch, 3, 16, 16]" in text and "3 convolutions, 1 linear layer" in text
    assert not networks.local_traces(path) or networks.local_traces(path) == ['.py"']
    assert sorted(each.name for each in path.parent.iterdir()) == ["net.py", "net.py.safetensors"]
    assert list(load_file(f"{path}.safetensors")) and EXPORTER.precision_of(path) == {"float32": 4}
    assert path.stat().st_mode == Path(f"{path}.safetensors").stat().st_mode
    found = compared(module, path, IMAGE)
    assert found.ok and found.batches == (1, 3) and found.weights_identical == (7, 7), found


def test_a_stranger_needs_torch_and_safetensors_only(chain):
    module, path = chain
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        assert name.partition('.')[0] not in ('foldexport', 'onnx', 'onnxruntime'), name\n"
        "sys.meta_path.insert(0, Blocked)\n"
        "import torch\n"
        "from net import load\n"
        "network = load()\n"
        "assert not network.training and all(each.requires_grad for each in network.parameters())\n"
        "network.train()(torch.ones(2, 3, 16, 16)).sum().backward()\n"
        "print(network.eval()(torch.ones(1, 3, 16, 16))[0, 0].item().hex())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=path.parent, capture_output=True, text=True, env=os.environ | {
        "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())})  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert done.stdout.strip() == module(torch.ones(1, *IMAGE))[0, 0].item().hex()


def test_a_wrong_weight_is_caught(chain, tmp_path):
    module, path = chain
    wrong = tmp_path / "net.py"
    wrong.write_bytes(path.read_bytes())
    tensors = load_file(f"{path}.safetensors")
    tensors["3.weight"][0, 0, 0, 0] = torch.nextafter(tensors["3.weight"][0, 0, 0, 0], torch.tensor(9.0))
    save_file(tensors, f"{wrong}.safetensors")
    found = match_weights(expected_weights(module), EXPORTER.weights(wrong))
    assert found.missing == ("3.weight",)
    assert not compared(module, wrong, IMAGE).ok


@pytest.mark.parametrize(("line", "wrong"), [("nn.ReLU6()", "nn.ReLU()"), ("padding=1, bias=False", "padding=1, dilation=1")])
def test_a_wrong_line_is_caught_before_anything_is_in_place(line, wrong, monkeypatch, tmp_path):
    """The first changes values that the weights do not show; the second asks for a weight that is not there."""
    original = source.written
    module = networks.chain()
    with torch.no_grad():
        module[3].weight.mul_(40)  # so that six is exceeded

    def planted(*args):
        text, tensors = original(*args)
        assert line in text
        return text.replace(line, wrong, 1), tensors

    monkeypatch.setattr(exporter, "written", planted)
    with pytest.raises(EquivalenceError, match="is not the network's bit for bit|does not load: .*Missing key"):
        EXPORTER.export(module, EXAMPLE, tmp_path / "net.py")


def test_weights_laid_out_otherwise_are_the_same_network(tmp_path):
    """Strides decide which kernel PyTorch takes, and the file does not keep them."""
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 1, stride=2), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()
    with torch.no_grad():
        module[2].weight = nn.Parameter(torch.randn(32, 1, 1, 16).permute(0, 3, 1, 2))
    for each in (module, copy.deepcopy(module).to(memory_format=torch.channels_last)):
        EXPORTER.export(each, (torch.randn(1, 3, 16, 16),), tmp_path / "net.py")


def test_everything_at_once_bit_for_bit(tmp_path):
    network, path = folded(Many(), IMAGE, (5,)), tmp_path / "net.py"
    assert isinstance(network.module, fx.GraphModule)
    done = api.export(network, "source", path, input_names=("image", "vector"))
    assert done.comparison.ok and done.comparison.weights_identical[0] == done.comparison.weights_identical[1]
    assert {each.name for each in done.files} == {"net.py", "net.py.safetensors"}
    text = path.read_text()
    assert "def forward(self, image, vector):" in text
    assert re.search(r"torch\.(maximum|minimum|clamp)\(", text), text
    assert "torch.cat([" in text and ".permute(" in text and "[:, :, 1:-1]" in text, text
    assert 'F.interpolate(' in text and ", mode=\"bilinear\")" in text and "keepdim=True" in text
    for internal in ("getitem", "clone", "aten.add", "aten.cat", "torch.fx", "foldexport."):
        assert internal not in text.replace("Written by foldexport.", ""), text
    again = artifact.sha256(path)
    api.export(folded(Many(), IMAGE, (5,)), "py", path, overwrite=True)
    assert artifact.sha256(path) == again


def test_a_resnet_is_read_on_two_pages(tmp_path):
    network = folded(ResNet(), (3, 32, 32))
    text, tensors = source.written(network.module, network.example, BATCH)
    lines = text.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 120
    assert "        x = F.relu(self.layer1_0_conv2(y) + x)" in lines
    assert "        self.layer2_0_downsample_0 = nn.Conv2d(4, 8, 1, stride=2)" in lines
    assert set(re.findall(r"^        (\w+) = ", text, re.MULTILINE)) == {"x", "y"}
    assert len(tensors) == 42 and "layer4_1_conv2.bias" in tensors
    checked.check(text)
    EXPORTER.export(network.module, network.example, tmp_path / "net.py")


def test_a_chain_whose_pool_moved_is_one_sequential():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1))

    network = folded(Plain(), IMAGE)
    text, tensors = source.written(network.module, network.example, BATCH)
    assert "class" not in text and set(tensors) == set(network.module.state_dict()) and "features_0.weight" in tensors
    checked.check(text)


def test_half_precision_is_in_the_file(tmp_path):
    network = folded(ResNet(blocks=1), (3, 32, 32))
    done = api.export(network, "pytorch", tmp_path / "net.py", precision="bf16")
    assert done.comparison.ok and done.comparison.unit == "bf16"
    text = done.path.read_text()
    assert "dtype=torch.bfloat16" in text and ".to(torch.bfloat16)" in text and ".to(torch.float32)" in text
    assert set(EXPORTER.precision_of(done.path)) == {"bfloat16"}
    with pytest.raises(PrecisionError):
        EXPORTER.export(networks.chain(), EXAMPLE, tmp_path / "other.py", ExportOptions(precision="int8"))


def test_same_bytes_from_another_process(chain, tmp_path):
    _, path = chain
    other, root = tmp_path / "other.py", Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", EXPORT_SCRIPT, "pytorch", str(other)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for suffix in ("", ".safetensors"):
        assert Path(f"{other}{suffix}").read_bytes() == Path(f"{path}{suffix}").read_bytes()


def test_names_that_python_and_torch_have_taken():
    root = nn.Module()
    for path in ("a_b", "0"):
        root.add_module(path, nn.Linear(2, 2))
    root.add_module("a", nn.Module())
    root.a.add_module("b", nn.Linear(2, 2))
    graph = fx.Graph()
    value = graph.placeholder("float")
    for path in ("a_b", "a.b", "0", "a_b"):
        value = graph.call_module(path, (value,))
    graph.output([value])
    text, tensors = source.written(fx.GraphModule(root, graph), (torch.zeros(1, 2),), BATCH)
    assert {name.partition(".")[0] for name in tensors} == {"a_b", "a_b_", "layer_0"}
    assert "def forward(self, float_):" in text and "return [" in text
    checked.check(text)


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


@fx.wrap
def own_function(x: Tensor) -> Tensor:
    return x


def test_what_has_no_plain_source():
    with pytest.raises(UsageError, match="is not folded, .* cannot be written as plain source"):
        source.written(Own(), EXAMPLE, BATCH)
    graph = fx.Graph()
    graph.output(graph.call_function(own_function, (graph.placeholder("x"),)))
    with pytest.raises(UsageError, match="calls own_function, which is no function of torch"):
        source.written(fx.GraphModule(nn.Module(), graph), EXAMPLE, BATCH)
    with pytest.raises(UsageError, match="`part` is a .*Own, not a layer of torch.nn"):
        layers.constructor(Own(), "part")


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv2d(4, 8, (3, 1), (2, 1), (1, 0), bias=False), "nn.Conv2d(4, 8, (3, 1), stride=(2, 1), padding=(1, 0), bias=False)"),
        (nn.Conv1d(2, 2, 3, padding="same", padding_mode="zeros"), 'nn.Conv1d(2, 2, 3, padding="same")'),
        (nn.ConvTranspose2d(4, 2, 2, 2, output_padding=1), "nn.ConvTranspose2d(4, 2, 2, stride=2, output_padding=1)"),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), "nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)"),
        (nn.AvgPool2d(2), "nn.AvgPool2d(2)"),
        (nn.AdaptiveAvgPool2d((1, None)), "nn.AdaptiveAvgPool2d((1, None))"),
        (nn.BatchNorm2d(3, eps=0.0, dtype=torch.float64), "nn.BatchNorm2d(3, eps=0.0, dtype=torch.float64)"),
        (nn.LayerNorm(6), "nn.LayerNorm(6)"),
        (nn.LayerNorm((4, 4), elementwise_affine=False), "nn.LayerNorm((4, 4), elementwise_affine=False)"),
        (nn.GroupNorm(2, 6), "nn.GroupNorm(2, 6)"),
        (nn.PReLU(5), "nn.PReLU(num_parameters=5)"),
        (nn.Hardtanh(-1.0, float("inf")), 'nn.Hardtanh(max_val=float("inf"))'),
        (nn.Linear(2, 3, dtype=torch.float16), "nn.Linear(2, 3, dtype=torch.float16)"),
        (nn.Upsample(scale_factor=2.0, mode="nearest"), "nn.Upsample(scale_factor=2.0)"),
        (nn.ConstantPad2d((1, 2, 0, 0), 0.5), "nn.ConstantPad2d((1, 2, 0, 0), 0.5)"),
    ],
    ids=lambda value: value.partition("(")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_constructors_make_the_layer_again(layer, text):
    assert layers.constructor(layer, "layer") == text
    again = eval(text, {"nn": nn, "torch": torch})
    assert repr(again) == repr(layer)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.25), nn.LeakyReLU(0.2), nn.SiLU(), nn.Softmax(1), nn.Flatten(2),
        nn.Flatten(1, 2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AdaptiveAvgPool2d((1, 2)),
        nn.ConstantPad2d((1, 2, 0, 1), 0.5), nn.ZeroPad2d(1), nn.PixelShuffle(2), nn.Identity(), nn.ELU(0.5),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_functions_do_what_the_layers_do(layer):
    x = torch.randn(2, 4, 6, 6)
    text = layers.functional(layer, "x")
    assert torch.equal(eval(text, {"F": F, "torch": torch, "x": x}), layer(x)), text


@pytest.mark.parametrize(
    "planted",
    [
        "import os", "from os import system", "open('x', 'w')", "exec('1')", "__import__('os')", "torch.load('x')", "torch.hub",
        "nn.modules.module.os.system('x')", "F.torch.load('x')", "torch.ops.load_library('x')", "torch.from_file('x')",
        "(lambda: 0)()", "load_file.__globals__", "torch.ones(1).numpy().tofile('x')", "torch.ops.aten.from_file.default('x')",
        "t = torch", "float = nn", "[x for x in ()]", "getattr(nn, 'x')", "f'{nn}'", "while True: pass", "global x", "del load",
    ],
)  # fmt: skip
def test_source_that_acts_is_not_run(chain, planted, tmp_path):
    path = tmp_path / "net.py"
    path.write_text(chain[1].read_text() + f"\n\n{planted}\n")
    with pytest.raises(EquivalenceError, match="line 3[0-9] of the file holds .* it was not run"):
        EXPORTER.load(path)


def test_files_that_are_damaged(chain, tmp_path):
    path = tmp_path / "net.py"
    path.write_bytes(chain[1].read_bytes())
    with pytest.raises(EquivalenceError, match="net.py.safetensors cannot be read"):
        EXPORTER.weights(path)
    with pytest.raises(EquivalenceError, match="does not load: FileNotFoundError"):
        EXPORTER.load(path)
    path.write_text("def")
    with pytest.raises(EquivalenceError, match="is no Python"):
        EXPORTER.load(path)


def test_the_users_own_source_is_never_replaced(chain, tmp_path):
    mine = tmp_path / "net.py"
    mine.write_text("class Net: ...\n")
    with pytest.raises(UsageError, match="Python source that foldexport did not write"):
        artifact.check_destination(mine, overwrite=True)
    artifact.check_destination(chain[1], overwrite=True)


class Makes(nn.Module):
    """Makes a tensor for every batch, on its input's device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu().mean((2, 3))
        return torch.cat([y, torch.zeros(x.shape[0], 1, device=x.device) + y[:, :1]], 1)


def test_a_tensor_that_the_network_makes_itself_is_made_where_its_input_is(tmp_path):
    folded = api.fold(Makes().eval(), EXAMPLE[0])
    EXPORTER.export(folded.module, EXAMPLE, tmp_path / "net.py", ExportOptions(dynamic=("batch",)))
    text = (tmp_path / "net.py").read_text()
    assert "device=x.device" in text and "'cpu'" not in text and '"cpu"' not in text
    spec = importlib.util.spec_from_file_location("written", tmp_path / "net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.load().to("meta")(torch.zeros(3, *IMAGE, device="meta")).shape == (3, 5)
