"""Networks that share keys and shapes and compute different things: what the file says decides, or the user is asked."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict

import pytest
import torch

from foldexport import checkpoint, fingerprints
from foldexport.errors import CheckpointError
from foldexport.fingerprints.data import table
from foldexport.fingerprints.table import PublishedFile
from foldexport.recognise import recognise
from tests.command import foldexport
from tests.fingerprints.networks import network, same_outputs, save

CFG = {"architecture": "resnetaa50", "tag": "a1h_in1k", "input_size": [3, 160, 160], "mean": [0.5] * 3, "url": "x"}


@pytest.fixture(scope="module")
def blurred():
    return network("timm", "resnetaa50", num_classes=5)


@pytest.fixture(scope="module")
def plain():
    return network("torchvision", "resnet50", num_classes=5)


@pytest.fixture(scope="module")
def padded():
    return network("timm", "tf_mobilenetv3_small_100", num_classes=5)


def test_the_two_share_keys_and_compute_different_things(blurred, plain):
    assert {k: t.shape for k, t in blurred.state_dict().items()} == {k: t.shape for k, t in plain.state_dict().items()}
    plain.load_state_dict(blurred.state_dict())
    assert not same_outputs(plain, blurred, (3, 64, 64))


@pytest.mark.parametrize("beside, said", [
    ({"arch": "resnetaa50"}, "the file's `arch` is resnetaa50"),
    ({"architecture": "timm/resnetaa50.a1h_in1k"}, "the file's `architecture` is timm/resnetaa50.a1h_in1k"),
    ({"args": {"model": "resnetaa50"}}, "the file's `args.model` is resnetaa50"),
    ({"hyper_parameters": {"model_name": "hf-hub:timm/resnetaa50.d_in12k"}}, "`hyper_parameters.model_name` is hf-hub:timm/"),
    ({"pretrained_cfg": CFG}, "the file's `pretrained_cfg.architecture` is resnetaa50"),
])  # fmt: skip
def test_an_architecture_named_in_the_file_goes_before_the_zoo(blurred, tmp_path, beside, said):
    found = recognise(save(tmp_path, blurred, **beside))
    assert found.name == "resnetaa50" and said in found.reason
    assert same_outputs(found.module, blurred, (3, 64, 64))
    if "pretrained_cfg" in beside:
        assert found.input_shapes == ((1, 3, 160, 160),) and found.preprocessing["mean"] == (0.5, 0.5, 0.5)
        assert "preprocessing taken from the file's pretrained_cfg: input_size, mean" in found.notes


@pytest.mark.parametrize("place, said", [
    ("resnetaa50_finetuned.pth", "its file name holds resnetaa50"),
    ("best-resnetaa50.a1h_in1k.pth", "its file name holds resnetaa50"),
    ("models--timm--resnetaa50.a1h_in1k/snapshots/1f0/weights.pth", "its folder's name holds resnetaa50"),
    ("20260101-resnetaa50-224/last.pth", "its folder's name holds resnetaa50"),
])  # fmt: skip
def test_names_of_file_and_folders_break_the_tie(blurred, tmp_path, place, said):
    path = tmp_path / place
    found = recognise(save(path.parent, blurred, path.name))
    assert found.name == "resnetaa50" and said in found.reason
    assert same_outputs(found.module, blurred, (3, 64, 64))


def test_config_json_beside_the_file_breaks_the_tie(blurred, tmp_path):
    path = save(tmp_path, blurred)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnetaa50", "pretrained_cfg": CFG}))
    found = recognise(path)
    assert found.name == "resnetaa50" and "config.json beside it says resnetaa50" in found.reason
    assert found.input_shapes == ((1, 3, 160, 160),)
    for other in ("[1, 2", "[]", '{"architecture": 3}', '{"architectures": ["ResNetForImageClassification"]}'):
        (tmp_path / "config.json").write_text(other)
        assert recognise(path).name == "ResNet"


def test_without_evidence_the_zoo_s_network_is_taken_and_the_others_are_named(plain, tmp_path):
    found = recognise(save(tmp_path, plain))
    assert found.name == "ResNet" and same_outputs(found.module, plain, (3, 64, 64))
    note = next(each for each in found.notes if "something else" in each)
    assert "timm's resnetaa50" in note and "--arch timm.models:resnetaa50 --arch-arg num_classes=5" in note


@pytest.mark.parametrize("name", ["resnet50-0676ba61.pth", "resnet50.a1_in1k.pth", "my_resnet50_run.pth"])
def test_a_name_of_the_zoo_s_own_network_keeps_the_zoo(plain, tmp_path, name):
    found = recognise(save(tmp_path, plain, name))
    assert found.name == "ResNet" and found.reason.endswith("its file name holds resnet50")
    assert not any("something else" in each for each in found.notes)
    crop = {"resnet50.a1_in1k.pth": 0.95}.get(name, 0.875)
    assert found.preprocessing["crop_pct"] == crop


def test_the_longest_name_counts(padded, tmp_path):
    assert recognise(save(tmp_path, padded, "tf_mobilenetv3_small_100-37f49e2b.pth")).name == "tf_mobilenetv3_small_100"
    plain = network("timm", "mobilenetv3_small_100")
    assert recognise(save(tmp_path, plain, "mobilenetv3_small_100.pth")).name == "mobilenetv3_small_100"


def test_a_former_name_is_that_of_today(tmp_path):
    theirs = network("timm", "tf_efficientnet_b0", num_classes=3)
    found = recognise(save(tmp_path, theirs, "tf_efficientnet_b0_ns-c0e6a31c.pth"))
    assert found.name == "tf_efficientnet_b0" and "holds tf_efficientnet_b0_ns" in found.reason
    assert found.preprocessing["mean"] == (0.485, 0.456, 0.406)  # of ns_jft_in1k; others of this network take 0.5
    assert same_outputs(found.module, theirs, (3, 65, 65))


def test_without_evidence_and_zoo_the_user_is_asked(padded, tmp_path):
    path = save(tmp_path, padded)
    with pytest.raises(CheckpointError) as caught:
        recognise(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 2 and caught.value.exit_code == 3
    for word in (str(path), "2 networks that compute different things", "timm's mobilenetv3_small_100",
                 "--arch timm.models:tf_mobilenetv3_small_100 --arch-arg num_classes=5"):  # fmt: skip
        assert word in message


def test_the_answer_works_and_knows_its_inputs(padded, tmp_path):
    path = save(tmp_path, padded)
    for arch, arguments in (
        ("timm.models:tf_mobilenetv3_small_100", {"num_classes": 5}),
        ("timm:create_model", {"model_name": "tf_mobilenetv3_small_100", "num_classes": 5}),
    ):
        found = recognise(path, arch=arch, arch_args=arguments)
        assert found.input_shapes == ((1, 3, 224, 224),) and found.preprocessing["interpolation"] == "bilinear"
        assert same_outputs(found.module, padded, (3, 65, 65))


def test_arguments_of_one_constructor_are_asked_for_alone(tmp_path):
    theirs = network("torchvision", "googlenet", num_classes=4, aux_logits=False, transform_input=True)
    path = save(tmp_path, theirs)
    asked = foldexport("inspect", path)
    assert asked.code == 3 and "Say which: --arch-arg transform_input=true; or --arch-arg transform_input=false." in asked.message
    found = recognise(path, arch_args={"transform_input": True})
    assert same_outputs(found.module, theirs, (3, 64, 64))


def test_a_published_file_is_known_by_its_checksum(plain, tmp_path, monkeypatch):
    """The table has the beginnings of published files' SHA-256; here that of a file made for the test."""
    path = save(tmp_path, plain)
    digest = checkpoint.sha256(path)[:8]
    assert table().files["11ad3fa6"] == PublishedFile("torchvision", "resnet50", "IMAGENET1K_V2")
    monkeypatch.setitem(table().files, digest, table().files["11ad3fa6"])
    found = recognise(path)
    assert found.reason.endswith("its SHA-256 is that of the published resnet50 IMAGENET1K_V2")
    assert found.preprocessing["crop_pct"] == 0.965517
    assert not any("differ" in each for each in found.notes)


@pytest.mark.parametrize("transform", [True, False])
def test_arguments_that_only_one_package_has(transform, tmp_path):
    """timm's Inception v3 is torchvision's with ``transform_input=False``, and takes no such argument."""
    theirs = network("torchvision", "inception_v3", num_classes=2, aux_logits=False, transform_input=transform)
    found = recognise(save(tmp_path, theirs), arch_args={"transform_input": transform})
    assert found.description == "inception_v3 of torchvision, 2 classes"
    assert same_outputs(found.module, theirs, (3, 96, 96))


def test_what_the_file_says_and_its_shapes_do_not_is_noted(plain, tmp_path):
    for said in ("resnet101", "house_net"):
        found = recognise(save(tmp_path, plain, arch=said))
        assert found.name == "ResNet" and any(f"`arch` is {said}" in each for each in found.notes)


def test_a_pickled_network_is_taken_as_it_is_where_the_zoo_could_be_wrong(blurred, tmp_path):
    torch.save(blurred, tmp_path / "whole.pth")
    found = recognise(tmp_path / "whole.pth", trust_pickle=True)
    assert found.reason == "the pickled module holds the network itself" and found.input_shapes == ((1, 3, 224, 224),)
    assert same_outputs(found.module, blurred, (3, 64, 64))


def test_a_file_that_is_damaged_is_reported_and_not_built(tmp_path):
    state = OrderedDict(network("timm", "resnet18d").state_dict())
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1\.weight has 1 of \d+ values that are not finite"):
        recognise(tmp_path / "net.pth")


def test_evidence_never_reads_outside_of_its_folder(blurred, tmp_path):
    inner = tmp_path / "weights"
    path = save(inner, blurred)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnetaa50"}))
    assert recognise(path).name == "ResNet"
    shutil.copy(tmp_path / "config.json", inner)
    assert recognise(path).name == "resnetaa50"


def test_match_is_none_for_what_no_one_published(tmp_path):
    torch.save({"conv.weight": torch.ones(2, 3, 1, 1)}, tmp_path / "net.pth")
    assert fingerprints.match(checkpoint.read(tmp_path / "net.pth")) is None
