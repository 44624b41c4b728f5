"""A user's network and a checkpoint that does not fit it: what is said, and that what is suggested does fit."""

from __future__ import annotations

import shlex

import pytest
import torch
from torch import Tensor, nn

from foldexport import checkpoint
from foldexport.arch import load_arch, load_weights, parse_arch_args
from foldexport.builder import Builder
from foldexport.checkpoint import misfit
from foldexport.errors import CheckpointError
from tests.command import foldexport

SOURCE = '''
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, reads, writes, bias):
        super().__init__()
        self.conv1 = nn.Conv2d(reads, writes, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(writes)
        self.conv2 = nn.Conv2d(writes, writes, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(writes)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()

class Net(nn.Module):
    """blocks: per stage. drops: a constructor that needs values, as stochastic depth has."""

    def __init__(self, blocks=(1, 2), width=8, CLASSES=10, CHANNELS=3, bias=False, multiplier=1.0, aux=False, drop=0.1):
        super().__init__()
        self.drops = [rate.item() for rate in torch.linspace(0, drop, sum(blocks))]
        width = int(width * multiplier)
        self.stem = nn.Conv2d(CHANNELS, width, 3)
        for number, count in enumerate(blocks, 1):
            reads, writes = width * max(1, 2 ** (number - 2)) if number > 1 else width, width * 2 ** (number - 1)
            layers = [Block(reads if at == 0 else writes, writes, bias) for at in range(count)]
            setattr(self, f"layer{number}", nn.Sequential(*layers))
        self.fc = nn.Linear(writes, CLASSES)
        self.aux = nn.Linear(width, CLASSES) if aux else None

    def forward(self, x):
        x = self.stem(x)
        for name, layer in self.named_children():
            x = layer(x) if name.startswith("layer") else x
        return self.fc(x.mean((2, 3)))

def small(pretrained=False, **options):
    return Net(**options)

class Scaled(nn.Sequential):
    def __init__(self, depth=11, n_out=4):
        plan = {11: 2, 16: 4, 19: 6}[depth]
        super().__init__(nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(plan))), nn.Conv2d(3, n_out, 1))

class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = Net((1, 1)), Net((2, 2), 4)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, classes: str = "num_classes", channels: str = "in_chans") -> None:
    (folder / "user_net.py").write_text(SOURCE.replace("CLASSES", classes).replace("CHANNELS", channels))


def state(spec: str = "user_net.py:Net", **arguments) -> dict[str, Tensor]:
    return {key: torch.rand_like(value) if value.is_floating_point() else value
            for key, value in load_arch(spec, arguments).state_dict().items()}  # fmt: skip


def unfit(tensors: dict[str, Tensor], spec: str = "user_net.py:Net", **arguments) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(load_arch(spec, arguments), tensors, "net.pth")
    return str(caught.value)


def assert_suggested(message: str, tensors: dict[str, Tensor], spec: str = "user_net.py:Net", **given) -> dict:
    """The last line ends with arguments under which the weights load; returns them."""
    before, option, after = message.splitlines()[-1].partition("--arch-arg")
    assert option and before.endswith(("try ", "with ")), message
    words = shlex.split(option + after)
    assert words[::2] == ["--arch-arg"] * len(words[::2]), message
    arguments = parse_arch_args(words[1::2])
    load_weights(load_arch(spec, {**given, **arguments}), tensors)
    return arguments


# ---- arguments that would fit, tried before they are said


@pytest.mark.parametrize("name", ["num_classes", "n_classes", "classes", "num_labels", "nc", "out_features", "how_many"])
def test_the_number_of_classes_by_the_constructors_own_name(folder, name):
    write(folder, classes=name)
    tensors = state(**{name: 7})
    message = unfit(tensors)
    assert f"The checkpoint has 7 outputs in fc: try --arch-arg {name}=7" in message
    assert assert_suggested(message, tensors) == {name: 7}


def test_classes_of_two_heads(folder):
    write(folder)
    tensors = state(aux=True, num_classes=7)
    message = unfit(tensors, aux=True)
    assert "7 outputs in fc and aux: try --arch-arg num_classes=7" in message


@pytest.mark.parametrize("name", ["in_chans", "in_channels", "channels", "spectra"])
def test_input_channels_by_the_constructors_own_name(folder, name):
    write(folder, channels=name)
    tensors = state(**{name: 5})
    message = unfit(tensors)
    assert f"reads 5 input channels in stem, the network 3: try --arch-arg {name}=5" in message
    assert_suggested(message, tensors)


def test_through_a_function_that_takes_any_options(folder):
    write(folder, classes="n_out", channels="spectra")
    tensors = state(n_out=7, spectra=5)
    message = unfit(tensors, "user_net.py:small")
    assert assert_suggested(message, tensors, "user_net.py:small") == {"n_out": 7, "spectra": 5}


@pytest.mark.parametrize(
    ("have", "given"),
    [
        ({"width": 16}, {}), ({"multiplier": 0.5}, {}), ({"blocks": (3, 1)}, {}), ({"blocks": (2, 2)}, {"blocks": [1, 1]}),
        ({"bias": True}, {}), ({"aux": True}, {}), ({"width": 12, "num_classes": 3, "in_chans": 1}, {}),
        ({"width": 16, "blocks": (2, 3)}, {"width": 4}),
    ],
    ids=str,
)  # fmt: skip
def test_other_widths_depths_and_switches(folder, have, given):
    write(folder)
    tensors = state(**have)
    assert_suggested(unfit(tensors, **given), tensors, **given)


def test_a_depth_by_name(folder):
    write(folder)
    tensors = state("user_net.py:Scaled", depth=19, n_out=6)
    assert assert_suggested(unfit(tensors, "user_net.py:Scaled"), tensors, "user_net.py:Scaled") == {"depth": 19, "n_out": 6}


def test_width_and_depth_are_told_in_words(folder):
    write(folder)
    assert "layers are 2 times as wide" in unfit(state(width=16))
    assert "has 3 parts in layer1, the network 1" in unfit(state(blocks=(3, 2)))
    assert "has a bias in 6 layers more, the network none" in unfit(state(bias=True))


def test_nothing_is_suggested_that_does_not_fit(folder):
    write(folder)
    tensors = state(num_classes=7)
    tensors["layer1.0.conv1.weight"] = torch.ones(8, 8, 5, 5)
    message = unfit(tensors)
    assert "--arch-arg" not in message and "layer1.0.conv1.weight [8, 8, 5, 5], wanted [8, 8, 3, 3]" in message


def test_suggestions_leave_no_trace(folder, capfd):
    write(folder)
    tensors = state(num_classes=7)
    network = load_arch("user_net.py:Net", {})
    numbers = torch.get_rng_state()
    with pytest.raises(CheckpointError):
        load_weights(network, tensors)
    assert torch.equal(numbers, torch.get_rng_state()) and capfd.readouterr() == ("", "")


def test_a_suggestion_that_was_not_tried_is_caught(folder, monkeypatch):
    write(folder)
    tensors = state(num_classes=7)
    monkeypatch.setattr(Builder, "_tried", lambda self, changes, tensors: misfit.Misfit({}, {}, (), (), ()))
    tensors["stem.weight"] = torch.ones(8, 5, 3, 3)
    message = unfit(tensors)
    with pytest.raises(CheckpointError):
        assert_suggested(message, tensors)


# ---- names


def renamed(tensors: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    for old, new in pairs:
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([("layer1", "stage_a")], ["`stage_a` were `layer1`"]),
        ([("layer1", "body.stages")], ["`body.stages` were `layer1`"]),
        ([("conv1", "a"), ("bn1", "norm_a")], ["`a` were `conv1`", "`norm_a` were `bn1`"]),
        ([("fc.", "head.")], ["`head` were `fc`"]),
    ],
)
def test_a_consistent_renaming_is_told(folder, pairs, told):
    write(folder)
    message = unfit(renamed(state(), *pairs))
    assert "Every name would fit if in the checkpoint's " in message
    for words in told:
        assert words in message, message


def test_names_without_a_system_are_not_explained(folder):
    write(folder)
    tensors = {f"parameter_{at}": value for at, value in enumerate(state().values())}
    message = unfit(tensors)
    assert "would fit" not in message and "not in the network: parameter_0" in message


def test_weights_of_another_framework(folder):
    write(folder)
    tensors = state()
    tensors = {k: v.permute(2, 3, 1, 0) if v.dim() == 4 else v.T if v.dim() == 2 else v for k, v in tensors.items()}
    assert "axes in another framework's order" in unfit(tensors)


# ---- files with several networks


def saved(folder, content: dict) -> dict[str, Tensor]:
    torch.save(content, folder / "net.pth")
    return checkpoint.read(folder / "net.pth").tensors


def test_the_one_part_that_fits_is_taken(folder):
    write(folder)
    one, other = state(blocks=(1, 1)), state(blocks=(2, 2), width=4)
    tensors = saved(folder, {"generator": one, "discriminator": other, "epoch": 3})
    network = load_arch("user_net.py:Net", {"blocks": (2, 2), "width": 4})
    notes = load_weights(network, tensors, "net.pth")
    assert notes == [f"took the names that begin with `discriminator.`; {len(one)} others are not used (`generator.`)"]
    assert torch.equal(network.fc.weight, other["fc.weight"])
    load_weights(load_arch("user_net.py:GAN"), saved(folder, {"generator": one, "discriminator": state(blocks=(2, 2), width=4)}))


def test_a_backbone_with_a_head_of_its_own_is_taken(folder):
    write(folder)
    tensors = {f"backbone.{key}": value for key, value in state().items()} | {"loss.centres": torch.ones(3, 4)}
    network = load_arch("user_net.py:Net")
    assert load_weights(network, tensors) == ["took the names that begin with `backbone.`; 1 others are not used (`loss.`)"]
    assert torch.equal(network.stem.weight, tensors["backbone.stem.weight"])


def test_two_parts_that_fit_are_named(folder):
    write(folder)
    tensors = saved(folder, {"student": state(), "teacher": state()})
    message = unfit(tensors)
    assert "net.pth: holds 2 networks that fit Net, under `student.`, `teacher.`." in message
    assert len(message.splitlines()) == 2 and "saved to a file of their own" in message


def test_parts_of_which_none_fits_are_named(folder):
    write(folder)
    tensors = saved(folder, {"generator": state(), "discriminator": state(blocks=(2, 2), width=4)})
    tensors["generator.extra"] = torch.ones(3)
    message = unfit(tensors)
    assert "The checkpoint holds `generator.` (" in message and "`discriminator.` (" in message
    assert "under `generator.` 34 of the network's 34 names fit" in message


def test_surplus_names_beside_a_fit_are_refused(folder):
    write(folder)
    assert "1 not in the network: extra.weight" in unfit(state() | {"extra.weight": torch.ones(3)})


# ---- through the command


def test_the_command_says_what_to_type(folder):
    write(folder)
    torch.save(state(num_classes=7), folder / "net.pth")
    words = ("net.pth", "--to", "ts", "--arch", "user_net.py:Net", "--input-shape", "1x3x16x16")
    result = foldexport(*words)
    assert result.code == 3 and "try --arch-arg num_classes=7" in result.err
    assert isinstance(load_arch("user_net.py:Net", {"num_classes": 7}), nn.Module)
    assert foldexport(*words, "--arch-arg", "num_classes=7").code == 0
