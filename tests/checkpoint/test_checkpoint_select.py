"""Which tensors are taken: wrappers, averages, prefixes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from foldexport import checkpoint
from tests.checkpoint_files import layouts, refused, same, save, state

WRAPPERS = ["state_dict", "model_state_dict", "model_state", "model", "params", "net", "network", "weights", "module"]
PREFIXES = ["module.", "_orig_mod.", "model.", "backbone.", "net."]


@pytest.mark.parametrize("key", WRAPPERS)
@layouts
def test_wrappers(tmp_path, layout, key):
    optimizer = {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]}
    read = checkpoint.read(
        save({"epoch": 3, "arch": "resnet", "optimizer": optimizer, key: state()}, tmp_path / "a.pth", layout)
    )
    same(read.tensors, state())
    assert read.taken == key
    assert read.metadata == {"epoch": 3, "arch": "resnet"}
    assert read.notes == [f"took the weights under `{key}`", "ignored beside the weights: optimizer"]


def test_unknown_single_wrapper_and_nested_wrappers(tmp_path):
    assert checkpoint.read(save({"my_net": state(), "step": 1}, tmp_path / "a.pth")).taken == "my_net"
    nested = checkpoint.read(save({"checkpoint": {"model": {"state_dict": state()}}}, tmp_path / "b.pth"))
    same(nested.tensors, state())
    assert nested.taken == "checkpoint.model.state_dict"
    listed = checkpoint.read(save([state(), {"lr": 0.1}], tmp_path / "c.pth"))
    same(listed.tensors, state())
    assert listed.taken == "[0]"


def test_one_of_two_wrappers_is_said(tmp_path):
    read = checkpoint.read(save({"model": state(1), "state_dict": state()}, tmp_path / "a.pth"))
    same(read.tensors, state())
    assert "more weights are there too (`model`), not used" in read.notes


def test_diracnet_older_layout_merges_params_and_stats(tmp_path):
    params = {"conv": torch.randn(4, 3, 3, 3), "bn.weight": torch.randn(4)}
    stats = {"bn.running_mean": torch.randn(4), "eye4_4_3_3": torch.randn(4, 4, 3, 3)}
    read = checkpoint.read(save({"params": params, "stats": stats}, tmp_path / "a.pth", "torch legacy"))
    same(read.tensors, {**params, **stats})
    assert read.taken == "params + stats"
    clash = save({"params": params, "stats": {"conv": torch.zeros(1)}}, tmp_path / "b.pth")
    refused(clash, "conv is both in `params` and in `stats`")


def test_diracnet_newer_layout_leaves_optimizer_and_epoch(tmp_path):
    read = checkpoint.read(save({"params": state(), "epoch": 9, "optimizer": {"state": {}}}, tmp_path / "a.pth"))
    same(read.tensors, state())
    assert read.taken == "params" and read.metadata == {"epoch": 9}


def test_parts_of_a_network_are_all_taken(tmp_path):
    read = checkpoint.read(save({"encoder": {"w": torch.ones(2)}, "head": {"b": torch.zeros(2)}}, tmp_path / "a.pth"))
    assert list(read.tensors) == ["encoder.w", "head.b"]
    assert "took `head` as a part of the network" in read.notes


@pytest.mark.parametrize("prefix", [*PREFIXES, "module._orig_mod.", "model.module.", "module.module."])
def test_prefix_of_every_key_is_stripped(tmp_path, prefix):
    read = checkpoint.read(
        save({"state_dict": {prefix + key: value for key, value in state().items()}}, tmp_path / "a.pth")
    )
    same(read.tensors, state())
    assert read.prefix == prefix
    assert f"stripped the prefix `{prefix}` from all 4 keys" in read.notes


def test_prefix_of_some_keys_stays(tmp_path):
    mixed = {"backbone.conv.weight": torch.ones(2), "classifier.weight": torch.ones(2)}
    read = checkpoint.read(save(mixed, tmp_path / "a.pth"))
    same(read.tensors, mixed)
    assert read.prefix == ""


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema_state_dict", "params_ema"])
def test_ema_is_never_chosen_silently(tmp_path, key):
    path = save({"state_dict": state(), key: state(1), "epoch": 1}, tmp_path / "a.pth")
    plain = checkpoint.read(path)
    same(plain.tensors, state())
    assert not plain.ema and f"EMA weights are there too (`{key}`), not used" in plain.notes
    averaged = checkpoint.read(path, use_ema=True)
    same(averaged.tensors, state(1))
    assert averaged.ema and averaged.taken == key and averaged.notes[0] == f"took the EMA weights under `{key}`"
    assert "the weights without EMA are there too (`state_dict`), not used" in averaged.notes


def test_ema_alone_is_taken_and_said(tmp_path):
    path = save({"model_ema": state(), "epoch": 1}, tmp_path / "a.pth")
    read = checkpoint.read(path)
    same(read.tensors, state())
    assert read.ema and "the file has EMA weights only (`model_ema`)" in read.notes
    refused(path, "EMA weights only (`model_ema`)", use_ema=False)
    refused(save(state(), tmp_path / "b.pth"), "has no EMA weights", use_ema=True)


def test_ema_among_the_names(tmp_path):
    flat = {f"model.{key}": value for key, value in state().items()}
    flat |= {f"model_ema.{key}": value for key, value in state(1).items()}
    path = save({"state_dict": flat}, tmp_path / "a.pth")
    same(checkpoint.read(path).tensors, state())
    same(checkpoint.read(path, use_ema=True).tensors, state(1))


def test_averaged_model_counter_does_not_hide_the_prefix(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    read = checkpoint.read(save({"model_ema": averaged.state_dict()}, tmp_path / "a.pth"))
    assert list(read.tensors) == ["weight", "bias"]
    assert read.prefix == "module." and read.metadata == {"n_averaged": 0}


def test_values_that_are_not_tensors_go_to_metadata(tmp_path):
    content = {
        **state(),
        "classes": ["cat", "dog"],
        "accuracy": 0.5,
        "loss": float("nan"),
        "hook": {"a": torch.Size([2])},
    }
    read = checkpoint.read(save(content, tmp_path / "a.pth"))
    same(read.tensors, state())
    assert (read.metadata["classes"], read.metadata["accuracy"]) == (["cat", "dog"], 0.5)
    assert read.metadata["loss"] == "nan"
    json.dumps(read.metadata, allow_nan=False)
