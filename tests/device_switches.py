"""float32 that is float32, whatever the process had switched on, and the switches put back as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foldexport import device
from foldexport.exporters.torchscript.exporter import TorchScriptExporter

OWNERS = {
    "cuda matmul": lambda: torch.backends.cuda.matmul, "cudnn conv": lambda: torch.backends.cudnn.conv,
    "mkldnn matmul": lambda: torch.backends.mkldnn.matmul, "mkldnn conv": lambda: torch.backends.mkldnn.conv,
}  # fmt: skip


def state() -> dict[str, str]:
    return {name: owner().fp32_precision for name, owner in OWNERS.items()}


def nothing():
    pass


def old_switches():
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")


def medium():
    torch.set_float32_matmul_precision("medium")


def all_of_torch():
    """The old switch is off, and cuDNN computes in TF32 all the same."""
    torch.backends.fp32_precision = "tf32"
    torch.backends.cudnn.allow_tf32 = False
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def new_switches():
    """Which torch refuses to read by their old names."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()


@pytest.fixture(params=[nothing, old_switches, medium, all_of_torch, new_switches], ids=lambda each: each.__name__)
def switched(request):
    """Switches as a user's process may have them; as they were before once the test is over."""
    before = device._switches()
    request.param()
    yield request.param.__name__
    torch.backends.fp32_precision = "none"
    device._set(before)


def test_full_float32_inside_and_everything_back_behind(switched):
    before, sums = state(), torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    with device.full_float32():
        assert set(state().values()) == {"ieee"} and torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        with device.full_float32():
            pass
        assert set(state().values()) == {"ieee"}
    assert state() == before and torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction == sums
    torch.backends.fp32_precision = "none"  # what was not set by name follows it again
    assert switched != "all_of_torch" or state()["mkldnn matmul"] == "none"


def test_an_error_inside_puts_them_back_too():
    before = state()
    with pytest.raises(ZeroDivisionError), device.full_float32():
        1 / 0  # noqa: B018
    assert state() == before


def test_reduced_products_on_the_cpu_are_noticed(switched):
    assert device.reduced_on_cpu() == (switched in ("old_switches", "medium", "all_of_torch"))
    with device.full_float32():
        assert not device.reduced_on_cpu()


def test_an_archive_says_no_tf32_whatever_the_process_has_on(switched, tmp_path):
    """A traced convolution remembers the switch of the process that traced it."""
    torch.manual_seed(0)
    module, path = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), tmp_path / "net.pt"
    TorchScriptExporter().export(module, (torch.zeros(1, 3, 8, 8),), path)
    graph = torch.jit.load(str(path)).inlined_graph
    found = [node for node in graph.nodes() if node.kind() == "aten::_convolution"]
    assert len(found) == 1 and list(found[0].inputs())[-1].toIValue() is False


def test_kinds_and_reasons():
    assert device.kind("cuda:1") == "cuda" and device.why_not("cpu:0") == "" and device.described("cpu:0") == "cpu:0"
    if not torch.cuda.is_available():
        assert device.why_not("cuda")
