"""Networks that the user names."""

from __future__ import annotations

import pathlib
import re

import pytest
from torch import nn

from foldexport.arch import load_arch, parse_arch_args
from foldexport.errors import UsageError

SOURCE = """
from torch import nn
import helper_beside

class Net(nn.Module):
    def __init__(self, depth=2, num_classes=10):
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth {depth} is too small")
        self.body = nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(depth)])
        self.fc = nn.Linear(3, num_classes)

def resnet18(**options): return Net(**options)
def resnet34(**options): return Net(**options)
def leaves(): raise SystemExit(3)
def returns_dict(): return {}
class Zoo:
    @staticmethod
    def small(): return Net(1)
built = Net(1)
NUMBER = 3

def with_transform(depth=1): return Net(depth), (lambda x: x)
def in_a_dict(): return {"model": nn.DataParallel(Net(1)), "epoch": 3}
def two(): return {"generator": Net(1), "discriminator": Net(2)}
def parallel(): return nn.DataParallel(Net(1))
class Needs(nn.Module):
    def __init__(self, block, layers, num_classes=10):
        super().__init__()
        self.body = nn.Sequential(*[block(3) for _ in range(layers)])
class HidesModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.modules = 3
class HoldsModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ReLU()
        self.modules = [self.layer]
def by_position(width, /): return Net(width)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    (tmp_path / "user_net.py").write_text(SOURCE)
    (tmp_path / "helper_beside.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(spec: str, *words: str, **arguments) -> None:
    with pytest.raises(UsageError) as caught:
        load_arch(spec, arguments)
    message = str(caught.value)
    assert caught.value.exit_code == 2 and len(message.splitlines()) <= 2
    for word in (spec, *words):
        assert word in message, message


# Arguments


def test_arguments_are_literals_or_text():
    parsed = parse_arch_args(
        ["depth=50", "widths=(64, 128)", "act=relu", "drop=0.1", "bias=False", "path=a=b", "name='x'", "empty="]
    )
    assert parsed == {
        "depth": 50, "widths": (64, 128), "act": "relu", "drop": 0.1, "bias": False, "path": "a=b", "name": "x",
        "empty": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("FALSE", False), ("none", None), ("null", None), ("None", None)]
)
def test_words_of_other_languages_are_not_text(text, value):
    assert parse_arch_args([f"pretrained={text}"]) == {"pretrained": value}


def test_arguments_never_run():
    assert parse_arch_args(["a=__import__('os')"]) == {"a": "__import__('os')"}


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["depth"], "wanted key=value"),
        (["=3"], "wanted key=value"),
        (["num-classes=3"], "did you mean num_classes?"),
        (["depth=1", "depth=2"], "given twice (1 and 2)"),
    ],
)
def test_malformed_arguments(pairs, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        parse_arch_args(pairs)


# Networks


@pytest.mark.parametrize("spec", ["user_net:Net", "user_net.py:Net", "./user_net.py:Net", "user_net:resnet18"])
def test_callable_by_module_or_file(folder, spec):
    network = load_arch(spec, {"depth": 3, "num_classes": 7})
    assert len(network.body) == 3 and network.fc.out_features == 7


def test_absolute_file_dotted_attribute_and_instance(folder, monkeypatch):
    monkeypatch.chdir("/")
    assert isinstance(load_arch(f"{folder}/user_net.py:Zoo.small", {}), nn.Module)
    assert isinstance(load_arch(f"{folder}/user_net.py:built"), nn.Module)


def test_installed_package():
    assert isinstance(load_arch("torch.nn:Identity", {}), nn.Identity)


def test_search_path_is_restored(folder):
    import sys

    before = list(sys.path)
    load_arch("user_net.py:Net", {})
    refused("user_net.py:Nothing")
    assert sys.path == before


def test_malformed_specs(folder):
    for spec in ("user_net", "user_net:", ":Net"):
        refused(spec, "wanted a zoo name, package.module:callable or path/file.py:callable")


def test_missing_modules_and_files(folder):
    refused("no_such_net:Net", "there is no module no_such_net here", str(folder), "--arch path/file.py:callable")
    refused("torch.no_such:Net", "there is no module torch.no_such here")
    refused("nets/resnet.py:Net", "no such file: nets/resnet.py")


def test_module_that_imports_what_is_not_installed(folder):
    (folder / "needs.py").write_text("import torch\nimport no_such_package\n")
    for spec in ("needs:Net", "needs.py:Net"):
        refused(spec, "imports no_such_package, which is not installed here", "needs.py:2")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = (\n", "SyntaxError"),
        ("x = 1\nraise RuntimeError('no GPU here')\n", "RuntimeError: no GPU here"),
        ("import sys\nsys.exit(1)\n", "exits while it is imported"),
    ],
)
def test_modules_that_do_not_import(folder, source, words):
    (folder / "broken_net.py").write_text(source)
    refused("broken_net.py:Net", words, "broken_net.py")


def test_missing_attribute_names_the_nearest(folder):
    refused("user_net:resnet19", "has no resnet19", "did you mean resnet18 or resnet34?")
    refused("user_net.py:qqqq", "has no qqqq", "it has Net, resnet18")
    refused("torch:nn", "is not callable (of type module)", "it has")


def test_not_callable_and_wrong_return(folder):
    refused("user_net:NUMBER", "is not callable (of type int)")
    refused("user_net:returns_dict", "returned a dict; wanted a torch.nn.Module")
    refused("user_net:built", "takes no --arch-arg depth", depth=3)


def test_callable_that_raises_keeps_its_message_and_line(folder):
    refused("user_net:Net", "ValueError: depth 0 is too small", "user_net.py:9", "depth=0", depth=0)
    refused("user_net:leaves", "SystemExit: 3")
    refused("user_net:Net", "unexpected keyword argument 'dept'", "it takes (depth=2, num_classes=10)", dept=3)
    refused("user_net:Net", "did you mean depth?", dept=3)
    refused("user_net:resnet18", "unexpected keyword argument 'dept'", "it takes (depth=2, num_classes=10)", dept=3)


def test_the_network_in_what_a_callable_returns(folder):
    assert len(load_arch("user_net:with_transform", {"depth": 3}).body) == 3
    for spec in ("user_net:in_a_dict", "user_net:parallel"):
        assert type(load_arch(spec)).__name__ == "Net"
    refused("user_net:two", "returned a dict with 2 networks (generator: Net, discriminator: Net)", "returns it alone")


def test_arguments_that_are_needed_are_named(folder):
    refused("user_net:Needs", "needs block and layers: pass --arch-arg block=… --arch-arg layers=…", "num_classes=10")
    refused("user_net:Needs", "needs block:", "a function of your own", layers=2)
    refused("user_net:Needs", "block='Conv2d' is passed as text", "user_net.py:", block="Conv2d", layers=2)
    refused("user_net:by_position", "needs width")


def test_a_hidden_method_is_told(folder):
    with pytest.raises(UsageError, match=r"HidesModules sets self.modules \(int\), which hides nn.Module.modules\(\)"):
        load_arch("user_net:HidesModules")


def test_a_list_that_hides_a_method_answers_for_it(folder):
    network = load_arch("user_net:HoldsModules")
    assert network.modules == [network.layer] and list(network.modules()) == [network, network.layer]


def test_a_file_of_a_package_imports_what_is_beside_it(folder):
    package = folder / "nets" / "deep"
    package.mkdir(parents=True)
    for place in (folder / "nets", package):
        (place / "__init__.py").write_text("")
    (folder / "nets" / "blocks.py").write_text("from torch import nn\nclass Block(nn.ReLU): pass\n")
    (package / "net.py").write_text("from ..blocks import Block\ndef make(): return Block()\n")
    assert type(load_arch("nets/deep/net.py:make")).__name__ == "Block"
    assert type(load_arch(f"{package}/net.py:make")).__name__ == "Block"


def test_relative_imports_without_a_package_are_told(folder):
    (folder / "alone.py").write_text("from .blocks import Block\n")
    refused("alone.py:Block", "imports from its package", "alone.py:1", "--arch package.module:callable")
