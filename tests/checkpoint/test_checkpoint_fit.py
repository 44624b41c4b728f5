"""Weights that do or do not fit a network."""

from __future__ import annotations

import textwrap

import pytest
import torch
from torch import nn

from foldexport.arch import load_weights
from foldexport.errors import CheckpointError


class Small(nn.Module):
    def __init__(self, classes: int = 5):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"body": Small()})


def weights(classes: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = Small(classes).state_dict()
    return {key: torch.rand_like(value) + 0.5 if value.is_floating_point() else value for key, value in state.items()}


def unfit(module: nn.Module, tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(module, tensors, "net.pth")
    assert caught.value.exit_code == 3 and str(caught.value).startswith("net.pth: does not fit ")
    return str(caught.value)


def loaded(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        assert torch.equal(module.state_dict()[key], tensor.to(module.state_dict()[key].dtype)), key


def test_exact_fit():
    module = Small()
    assert load_weights(module, weights()) == []
    loaded(module, weights())


@pytest.mark.parametrize("module_has", [True, False])
def test_num_batches_tracked_is_ignored(module_has):
    module = (
        nn.Sequential(nn.BatchNorm2d(2))
        if module_has
        else nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True))
    )
    tensors = {key: torch.rand(2) for key in module.state_dict() if "num_batches" not in key}
    if not module_has:
        del module[0]._buffers["num_batches_tracked"]
        tensors["0.num_batches_tracked"] = torch.tensor(3)
    load_weights(module, tensors)


def test_missing_and_surplus_names_are_listed():
    tensors = weights()
    del tensors["conv.bias"]
    tensors |= {f"extra.{index}": torch.ones(1) for index in range(7)}
    message = unfit(Small(), tensors)
    assert message == textwrap.dedent("""\
        net.pth: does not fit Small:
          1 missing from the checkpoint: conv.bias
          7 not in the network: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more""")


def test_other_number_of_classes_is_explained():
    message = unfit(Small(5), weights(9))
    assert message == textwrap.dedent("""\
        net.pth: does not fit Small:
          2 of another shape: fc.weight [9, 4], wanted [5, 4], fc.bias [9], wanted [5]
          The checkpoint has 9 outputs in fc: try --arch-arg num_classes=9""")


def test_other_shapes_are_not_called_classes():
    tensors = weights()
    tensors["conv.weight"] = torch.ones(4, 3, 5, 5)
    message = unfit(Small(), tensors)
    assert "conv.weight [4, 3, 5, 5], wanted [4, 3, 3, 3]" in message and "num_classes" not in message


def test_prefix_is_stripped_where_all_names_fit():
    module = Small()
    notes = load_weights(module, {f"trunk.net.{key}": value for key, value in weights().items()})
    assert notes == ["matched names by stripping the prefix `trunk.net.` from the checkpoint's"]
    loaded(module, weights())


def test_prefix_is_added_where_all_names_fit():
    module = Wrapped()
    notes = load_weights(module, weights())
    assert notes == ["matched names by adding the prefix `encoder.body.` to the checkpoint's"]
    loaded(module.encoder["body"], weights())


def test_prefix_that_explains_most_is_suggested():
    tensors = {f"trunk.{key}": value for key, value in weights().items()}
    del tensors["trunk.fc.bias"]
    assert "does not fit Small: 0 of 8 names fit (8 would, stripped of `trunk.`)" in unfit(Small(), tensors)


def test_classes_are_explained_behind_a_prefix():
    assert "num_classes=9" in unfit(Small(5), {f"trunk.{key}": value for key, value in weights(9).items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    module = Small()
    tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights().items()}
    name = str(dtype).removeprefix("torch.")
    assert load_weights(module, tensors) == [f"widened 8 of 8 float tensors from {name} to float32, the network's own"]
    assert module.conv.weight.dtype == torch.float32
    loaded(module, tensors)


def test_network_keeps_its_precision():
    module = Small().double()
    assert load_weights(module, weights()) == [
        "widened 8 of 8 float tensors from float32 to float64, the network's own"
    ]
    assert module.conv.weight.dtype == torch.float64
    notes = load_weights(
        Small(), {key: value.double() if value.is_floating_point() else value for key, value in weights().items()}
    )
    assert notes == ["rounded 8 of 8 float tensors from float64 to float32, the network's own"]


def test_scalars_of_shape_one():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = nn.Parameter(torch.tensor(1.0))

    module = Scaled()
    load_weights(module, {"alpha": torch.tensor([3.0])})
    assert module.alpha.item() == 3.0


def test_names_that_the_networks_own_hook_maps():
    class Renamed(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            if f"{prefix}kernel" in state_dict:
                state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
            super()._load_from_state_dict(state_dict, prefix, *rest)

    module = nn.Sequential(Renamed(2, 2))
    load_weights(module, {"0.kernel": torch.full((2, 2), 3.0), "0.bias": torch.zeros(2)})
    assert module[0].weight[0, 0].item() == 3.0


def test_lazy_modules_take_their_shapes_from_the_checkpoint():
    module = nn.Sequential(nn.LazyConv2d(4, 3))
    load_weights(module, {"0.weight": torch.ones(4, 3, 3, 3), "0.bias": torch.zeros(4)})
    assert module[0].weight.shape == (4, 3, 3, 3)
