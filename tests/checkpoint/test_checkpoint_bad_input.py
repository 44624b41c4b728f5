"""Files that are no readable checkpoint: one or two lines that say what they are and what to do."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pathlib
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foldexport import checkpoint
from foldexport.errors import CheckpointError
from tests.checkpoint_files import LAYOUTS, Network, layouts, refused, rewrite_zip, same, save, state, write


def test_missing_file_suggests_the_nearest(tmp_path):
    save(state(), tmp_path / "resnet50.pth")
    refused(tmp_path / "resnet5O.pth", "no such file", f"did you mean {tmp_path / 'resnet50.pth'}?")
    refused(tmp_path / "none" / "a.pth", "no such file", f"the folder {tmp_path / 'none'} does not exist")


def test_folder_names_its_checkpoints(tmp_path):
    refused(tmp_path, "is a folder", "it has none")
    save(state(), tmp_path / "a.pth")
    refused(tmp_path, "is a folder", "a.pth")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path):
    path = save(state(), tmp_path / "a.pth")
    path.chmod(0)
    refused(path, "cannot be read", "Permission denied")


def test_empty(tmp_path):
    refused(write(tmp_path / "a.pth", b""), "empty (0 bytes)")


@layouts
def test_truncated_anywhere(tmp_path, layout):
    whole = save(state(), tmp_path / "whole.pth", layout).read_bytes()
    cuts = {*range(16, len(whole), max(1, len(whole) // 60)), len(whole) - 1, len(whole) - 9}
    for cut in sorted(cuts):
        refused(write(tmp_path / "cut.pth", whole[:cut]), "truncated or damaged", "again")


def test_truncated_safetensors(tmp_path):
    save_file(state(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for cut in (40, len(whole) // 2, len(whole) - 1):
        refused(write(tmp_path / "cut.safetensors", whole[:cut]), "truncated or damaged", f"{cut:,} bytes")


def test_flipped_bit_is_noticed(tmp_path):
    path = save({"w": torch.arange(64.0)}, tmp_path / "a.pth")
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(64.0).numpy().tobytes()) + 5] ^= 1
    refused(write(path, bytes(data)), "damaged", "CRC-32")


@pytest.mark.parametrize("kind", ["torch zip", "torch legacy", "safetensors", "torchscript", "pt2"])
def test_random_damage_is_refused_or_read(tmp_path, kind):
    """No damage escapes as an error of zipfile's, pickle's, safetensors' or torch's own."""
    whole = written(kind, tmp_path)
    random, path = np.random.default_rng(0), tmp_path / "damaged"
    for _ in range(60):
        data = bytearray(whole)
        for index in random.integers(0, len(data), random.choice([1, 3, 20])):
            data[index] = random.integers(256)
        try:
            checkpoint.read(write(path, bytes(data)))
        except CheckpointError as error:
            assert len(str(error).splitlines()) <= 2


def written(kind: str, folder: pathlib.Path) -> bytes:
    path = folder / "net.pt2"
    if kind in LAYOUTS:
        save({"model": state(), "args": argparse.Namespace(lr=0.1)}, path, kind)
    elif kind == "safetensors":
        save_file(state(), path)
    elif kind == "torchscript":
        torch.jit.script(Network()).save(str(path))
    else:
        torch.export.save(torch.export.export(Network().eval(), (torch.randn(2, 3, 8, 8),)), path)
    return path.read_bytes()


def test_zip_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(state(), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    same(checkpoint.read(path).tensors, state())


def test_damaged_torchscript(tmp_path):
    torch.jit.script(Network()).save(str(tmp_path / "net.pt"))
    rewrite_zip(tmp_path / "net.pt", {"net/data.pkl": lambda data: data[: len(data) // 2]})
    refused(tmp_path / "net.pt", "TorchScript archive does not load")


def test_html_page(tmp_path):
    page = "<!DOCTYPE html>\n<html><head><title>\n Sign in &amp; download </title></head><body></body></html>"
    refused(write(tmp_path / "a.pth", page), "web page", '"Sign in & download"', "again")
    refused(write(tmp_path / "b.pth", "\n<html><body>404</body></html>"), "web page")


def test_git_lfs_pointer(tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 102531093\n"
    refused(
        write(tmp_path / "a.pth", pointer),
        "git-LFS pointer",
        "4d7a21464d7a",
        "102,531,093 bytes",
        "git lfs pull --include a.pth",
    )


def test_text_and_json(tmp_path):
    refused(write(tmp_path / "a.pth", "epoch,loss\n1,0.5\n"), "text file", '"epoch,loss"')
    refused(write(tmp_path / "b.pth", "Ошибка: файл не найден\n" * 9000), "text file", "\\u041e")
    refused(write(tmp_path / "c.pth", '{"error": "not found"}'), "JSON document", '"error"')
    index = json.dumps({"metadata": {}, "weight_map": {"a": "model-1.bin", "b": "model-2.bin"}})
    refused(write(tmp_path / "d.json", index), "2 parts", "model-1.bin, model-2.bin")


def test_archives_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("weights/best.pth", b"x")
        archive.writestr("readme.txt", b"x")
    refused(tmp_path / "a.pth", "zip archive", "readme.txt", "pass weights/best.pth")
    np.savez(tmp_path / "b.npz", w=np.ones(2))
    refused(tmp_path / "b.npz", "NumPy .npz archive of 1 arrays")
    save(state(), tmp_path / "net.pth")
    with tarfile.open(tmp_path / "c.pth", "w") as archive:
        archive.add(tmp_path / "net.pth", "net.pth")
    refused(tmp_path / "c.pth", "tar archive", "pass net.pth")
    write(tmp_path / "d.pth.gz", gzip.compress(b"x"))
    refused(tmp_path / "d.pth.gz", "gzip", "decompress")
    with zipfile.ZipFile(tmp_path / "e.pth", "w"):
        pass
    refused(tmp_path / "e.pth")


def test_tar_file_of_torch_0_1_1(tmp_path):
    with tarfile.open(tmp_path / "a.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    refused(tmp_path / "a.pth", "PyTorch 0.1.1 or older")


def test_onnx_model_by_mistake(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    io_info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", io_info[:1], io_info[1:])
    for name, producer in (("a.onnx", "pytorch"), ("b.pth", "pytorch"), ("c.pth", "")):
        onnx.save(helper.make_model(graph, producer_name=producer), tmp_path / name)
        refused(tmp_path / name, "ONNX model, already exported")


def test_unknown_bytes(tmp_path):
    refused(write(tmp_path / "a.pth", bytes(range(255, 0, -1)) + b"\x00" * 9), "ff fe fd fc", "Wanted")


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        ({}, "an empty dict"),
        ({"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "epoch, optimizer"),
        ([1, 2], "a list"),
        ("text", "a str"),
    ],
)
@layouts
def test_no_weights_inside(tmp_path, layout, content, holds):
    refused(save(content, tmp_path / "a.pth", layout), f"no weights inside; it holds {holds}")


def test_single_tensor(tmp_path):
    refused(save(torch.ones(2), tmp_path / "a.pth"), "a single tensor")


def test_dict_that_holds_itself_ends(tmp_path):
    loop: dict = {}
    loop["model"] = loop
    refused(save(loop, tmp_path / "a.pth"), "no weights inside")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised (torch.qint8)"),
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.ones(2, device="meta"), "a meta tensor"),
    ],
    ids=["quantised", "sparse", "meta"],
)
def test_tensors_without_plain_values(tmp_path, tensor, what):
    refused(save({"conv.weight": tensor()}, tmp_path / "a.pth"), "conv.weight is", what)


def test_check_finite():
    tensors = {"a.weight": torch.ones(2, 3), "count": torch.tensor(3), "b.weight": torch.ones(2, 3)}
    checkpoint.check_finite(tensors)
    tensors["b.weight"][1, 2] = float("nan")
    tensors["b.weight"][1, 1] = float("-inf")
    with pytest.raises(
        CheckpointError, match=r"net.pth: b.weight has 2 of 6 values that are not finite, the first -inf at \[1, 1\]"
    ):
        checkpoint.check_finite(tensors, "net.pth")
    with pytest.raises(CheckpointError, match=r"scale has 1 of 1 values that are not finite, the first nan at \[\]"):
        checkpoint.check_finite({"scale": torch.tensor(float("nan"))})


def test_check_running_var():
    tensors = {"bn.running_var": torch.tensor([1.0, 0.0, 2.0]), "bn.running_mean": torch.tensor([-1.0])}
    checkpoint.check_running_var(tensors)
    tensors["bn.running_var"][2] = -0.5
    with pytest.raises(CheckpointError, match=r"bn.running_var is negative \(-0.5\) in channel 2; "):
        checkpoint.check_running_var(tensors)


def test_reading_leaves_torch_as_it_was(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    checkpoint.read(save(state(), tmp_path / "a.pth"))
    assert set(torch.serialization.get_safe_globals()) == before


def test_reading_does_not_touch_the_file_or_its_folder(tmp_path):
    path = save(state(), tmp_path / "a.pth")
    copy = shutil.copy(path, tmp_path / "b.pth")
    checkpoint.read(path)
    assert path.read_bytes() == pathlib.Path(copy).read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.pth", "b.pth"]
