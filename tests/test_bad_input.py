"""Every kind of bad input through the command: the right exit code, one or two lines, no file touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from foldexport import exporters
from tests.checkpoint_files import Plant, plants
from tests.command import PLAIN, Result, files, foldexport, save_dirac, save_plain

HTML = "<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>no such file</body></html>"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 12345\n"


def refused(
    folder: Path, code: int, *words: str, options: tuple = (), to: str = "onnx,ts", checkpoint: Path | None = None
) -> Result:
    """The command ends with ``code``, says ``words`` in one or two lines, and leaves the folder as it was."""
    before = {name: _content(folder / name) for name in files(folder)}
    result = foldexport(checkpoint or folder / "net.pth", "--to", to, *options)
    assert result.code == code, (result.code, result.out, result.err)
    for word in words:
        assert word in result.message, result.message
    assert result.out == ""
    assert {name: _content(folder / name) for name in files(folder)} == before
    return result


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


# ---- files that are no checkpoint


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (HTML.encode(), "HTML"),
        (LFS.encode(), "git-lfs"),
        (b"hello, world\n", "net.pth"),
        (bytes(1000), "net.pth"),
    ],
    ids=["empty", "html", "lfs", "text", "zeros"],
)
def test_no_checkpoint(tmp_path, content, word):
    (tmp_path / "net.pth").write_bytes(content)
    assert word.lower() in refused(tmp_path, 3).message.lower()


def test_not_a_file(tmp_path):
    refused(tmp_path, 3, "net.pth")
    (tmp_path / "folder").mkdir()
    refused(tmp_path, 3, "folder", checkpoint=tmp_path / "folder")


def test_truncated(tmp_path):
    whole = save_dirac(tmp_path / "net.pth").read_bytes()
    for length in (1, 100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "net.pth").write_bytes(whole[:length])
        refused(tmp_path, 3, "net.pth")


@pytest.mark.parametrize("name", plants(Path("x")))
def test_a_pickle_with_code_does_not_run(tmp_path, name):
    marker = tmp_path / "ran"
    torch.save({"state_dict": plants(marker)[name]}, tmp_path / "net.pth")
    refused(tmp_path, 3, "--trust-pickle")
    assert not marker.exists()


def test_a_pickle_with_code_runs_when_it_is_trusted(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"state_dict": Plant(os.system, f"touch {marker}")}, tmp_path / "net.pth")
    assert foldexport(tmp_path / "net.pth", "--to", "ts", "--trust-pickle").code == 3 and marker.exists()


# ---- checkpoints of no known network, or that do not fit


def _spoil(folder: Path, change: Callable[[dict, dict], None]) -> None:
    path = save_dirac(folder / "net.pth")
    content = torch.load(path, weights_only=True)
    change(content["params"], content["stats"])
    torch.save(content, path)


def test_unknown_keys_ask_for_an_arch(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "net.pth")
    refused(tmp_path, 3, "layer.weight", "--arch")


def test_missing_keys(tmp_path):
    _spoil(tmp_path, lambda params, stats: params.pop("group1.block0.conv"))
    refused(tmp_path, 3, "missing", "group1.block0.conv")


def test_surplus_keys(tmp_path):
    _spoil(tmp_path, lambda params, stats: params.update(extra=torch.zeros(3)))
    refused(tmp_path, 3, "surplus", "extra")


def test_wrong_shapes(tmp_path):
    _spoil(tmp_path, lambda params, stats: params.update({"group1.block0.alpha": torch.zeros(3)}))
    refused(tmp_path, 3, "group1.block0.alpha", "[3]", "[8]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    _spoil(tmp_path, lambda params, stats: params["group0.block1.conv"].view(-1)[5:6].fill_(value))
    refused(tmp_path, 3, "group0.block1.conv", str(value))


def test_negative_running_variance(tmp_path):
    _spoil(tmp_path, lambda params, stats: stats["group0.block1.bn.running_var"][2:3].fill_(-0.5))
    refused(tmp_path, 3, "group0.block1.bn.running_var", "channel 2", "-0.5")


def test_half_precision_weights_are_widened_and_told(tmp_path):
    path = save_dirac(tmp_path / "net.pth")
    content = torch.load(path, weights_only=True)
    torch.save({part: {key: value.half() for key, value in content[part].items()} for part in content}, path)
    result = foldexport(path, "--to", "ts")
    assert result.code == 0 and "widened to float32" in result.out


@pytest.mark.parametrize("damage", ["nan", "negative"])
def test_damage_under_a_network_of_the_user(tmp_path, damage):
    checkpoint, arch = save_plain(tmp_path)
    state = torch.load(checkpoint)
    state["1.running_var"][1] = float("nan") if damage == "nan" else -1.0
    torch.save(state, checkpoint)
    refused(tmp_path, 3, "1.running_var", options=("--arch", arch, "--input-shape", "1x3x6x6"))


# ---- --arch


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nothing_of_the_kind:Net", ["no module nothing_of_the_kind"]),
        ("FOLDER/absent.py:Net", ["no such file"]),
        ("FOLDER/broken.py:Net", ["broken.py does not import", "NameError"]),
        ("FOLDER/net.py:Nett", ["has no Nett", "did you mean Net?"]),
        ("FOLDER/other.py:number", ["not callable", "int"]),
        ("FOLDER/other.py:text", ["returned a str", "torch.nn.Module"]),
        ("FOLDER/other.py:raises", ["ValueError: no luck", "other.py:3"]),
        ("resnet999", ["resnet999", "package.module:callable"]),
    ],
)
def test_arch_that_cannot_be_used(tmp_path, spec, words):
    save_plain(tmp_path)
    (tmp_path / "broken.py").write_text("Net = undefined\n")
    (tmp_path / "other.py").write_text(
        "number = 3\ndef text(): return 'a'\ndef raises(): raise ValueError('no luck')\n"
    )
    options = ("--arch", spec.replace("FOLDER", str(tmp_path)), "--input-shape", "1x3x6x6")
    refused(tmp_path, 2, *words, options=options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--arch-arg", "width=4"), ["--arch-arg", "--arch"]),
        (("--arch", "ARCH", "--arch-arg", "width"), ["key=value"]),
        (("--arch", "ARCH", "--arch-arg", "depth=9"), ["depth"]),
        (("--arch", "ARCH"), ["--input-shape"]),
    ],
)
def test_arch_arguments_and_shapes(tmp_path, options, words):
    _, arch = save_plain(tmp_path)
    refused(tmp_path, 2, *words, options=tuple(arch if word == "ARCH" else word for word in options))


def test_weights_that_do_not_fit_the_arch(tmp_path):
    _, arch = save_plain(tmp_path)
    torch.save({"0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "net.pth")
    refused(tmp_path, 3, "0.bias", options=("--arch", arch, "--input-shape", "1x3x6x6"))


# ---- networks that cannot be folded


def _network(folder: Path, forward: str, layers: str = "nn.Conv2d(3, 4, 3)") -> tuple:
    source = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n\nclass Net(nn.Module):\n"
    source += f"    def __init__(self):\n        super().__init__()\n        self.layer = {layers}\n"
    _, arch = save_plain(folder, source + f"    def forward(self, x):\n        {forward}\n")
    return "--arch", arch, "--input-shape", "1x3x6x6"


def test_input_shape_that_the_network_rejects(tmp_path):
    options = _network(tmp_path, "return self.layer(x)")
    arch, shape = options[:2], "--input-shape"
    refused(tmp_path, 2, "rejects input shape 1x5x6x6", shape, options=(*arch, shape, "1x5x6x6"))
    refused(tmp_path, 2, "such as 1x3x224x224", options=(*arch, shape, "1x3xbig"))
    refused(tmp_path, 2, "no such input can be made", options=(*arch, shape, "1x3x99999999x99999999"))
    refused(tmp_path, 2, "rejects", options=(*options, shape, "1x3x6x6"))


def test_untraceable(tmp_path):
    options = _network(tmp_path, "return self.layer(x) if x.sum() > 0 else x")
    refused(tmp_path, 2, "cannot trace Net", "net.py:10", options=options)


def test_random_operator(tmp_path):
    options = _network(tmp_path, "return F.dropout(self.layer(x))")
    refused(tmp_path, 2, "random in eval mode", "dropout", options=options)


def test_batch_norm_without_running_statistics_is_kept_and_told(tmp_path):
    source = PLAIN.replace("nn.BatchNorm2d(width)", "nn.BatchNorm2d(width, track_running_stats=False)")
    checkpoint, arch = save_plain(tmp_path, source)
    result = foldexport(checkpoint, "--arch", arch, "--input-shape", "1x3x6x6", "--to", "onnx,ts")
    assert result.code == 0, result.err
    shown = " ".join(result.out.split())
    assert "no running statistics are stored" in shown and "kept" in shown


# ---- formats, devices, precision, data


def test_unknown_format(tmp_path):
    save_dirac(tmp_path / "net.pth")
    assert "did you mean onnx" in refused(tmp_path, 2, "'onxx'", to="onxx").message
    refused(tmp_path, 2, "no format", to=",")


def test_missing_dependency(tmp_path, monkeypatch):
    save_dirac(tmp_path / "net.pth")
    row = replace(exporters.FORMATS["onnx"], packages=("torch", "surely_not_there"), extra="onnx")
    monkeypatch.setitem(exporters.FORMATS, "onnx", row)
    refused(tmp_path, 5, "surely_not_there", "pip install 'foldexport[onnx]'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_gpu(tmp_path):
    save_dirac(tmp_path / "net.pth")
    refused(tmp_path, 5, "--device cuda: ", options=("--device", "cuda"))


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--precision", "int8"), 2, ["int8", "ONNX only"]),
        (("--precision", "fp99"), 2, ["fp99", "fp32"]),
        (("--opset", "1"), 2, ["opset"]),
        (("--dynamic", "depth"), 2, ["depth", "batch, height, width"]),
        (("--atol", "-1"), 2, ["--atol"]),
        (("--rtol", "many"), 2, ["--rtol"]),
        (("--seed", "-1"), 2, ["--seed"]),
        (("--device", "tpu"), 2, ["tpu"]),
        (("--ema",), 3, ["EMA"]),
        (("--dynamic", "batch,height,width"), 2, ["--dynamic height", "--dynamic batch"]),
        (("--input-name", "a", "--input-name", "b"), 2, ["2 input names", "1 input"]),
    ],
)
def test_options_that_cannot_be_honoured(tmp_path, options, code, words):
    save_dirac(tmp_path / "net.pth")
    refused(tmp_path, code, *words, options=options)


def test_data_that_does_not_fit(tmp_path):
    save_dirac(tmp_path / "net.pth")
    refused(tmp_path, 2, "no such file", options=("--data", tmp_path / "absent.npz"))
    refused(tmp_path, 2, "no images", options=("--data", tmp_path))
    (tmp_path / "text.npz").write_text("no arrays")
    refused(tmp_path, 2, "text.npz", options=("--data", tmp_path / "text.npz"))
    np.savez(tmp_path / "small.npz", x=np.zeros((2, 3, 8, 8), np.float32))
    refused(tmp_path, 2, "3x8x8", "3x32x32", options=("--data", tmp_path / "small.npz"))
    np.savez(tmp_path / "objects.npz", x=np.array([{}, []], dtype=object))
    refused(tmp_path, 2, "objects.npz", options=("--data", tmp_path / "objects.npz"))


# ---- places to write to


def test_existing_output(tmp_path):
    save_dirac(tmp_path / "net.pth")
    for name in ("net.onnx", "net.torchscript.pt", "net.manifest.json"):
        (tmp_path / name).write_text("precious")
        refused(tmp_path, 2, name, "--overwrite")
        (tmp_path / name).unlink()


def test_output_that_cannot_be_written(tmp_path):
    save_dirac(tmp_path / "net.pth")
    (tmp_path / "file").write_text("in the way")
    refused(tmp_path, 2, "file", "-o", options=("-o", f"{tmp_path}/file/below/"))
    refused(tmp_path, 2, "one file", options=("-o", tmp_path / "net.onnx"))
    refused(tmp_path, 2, "named as onnx", options=("-o", tmp_path / "out.onnx"), to="ts")


def test_folder_without_permission(tmp_path):
    save_dirac(tmp_path / "net.pth")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # the superuser writes everywhere but into the kernel's own folders
        locked = Path("/proc")
    if not locked.is_dir():
        pytest.skip("every folder here can be written to")
    refused(tmp_path, 2, "cannot write", "-o", options=("-o", f"{locked}/"))
