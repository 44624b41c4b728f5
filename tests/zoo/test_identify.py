from __future__ import annotations

import pytest
import torch

from foldexport import zoo
from foldexport.errors import CheckpointError, UsageError
from foldexport.zoo.diracnet import FoldedDiracNet, make_plan
from tests.zoo.states import published, random_network
from tests.zoo.test_diracnet import SMALL, ids


@pytest.fixture(scope="module")
def tensors():
    return published(random_network(make_plan(depth=10, width=0.5)))


def size_of(plan):
    return (2, 3, 32, 32) if plan.dataset == "CIFAR" else (2, 3, 64, 64)


@pytest.mark.parametrize("layout", ["published", "network"])
@pytest.mark.parametrize("variant", SMALL, ids=ids)
def test_unfolded_files_are_recognised(variant, layout):
    plan = make_plan(**variant)
    network = random_network(plan)
    found = zoo.identify(published(network) if layout == "published" else network.state_dict())
    assert found.module.plan == plan
    assert not found.module.training
    assert found.name == "DiracNet"
    width, classes = f"width {plan.width:g}", f"{plan.num_classes} classes"
    facts = ("DiracNet v" + str(plan.version), plan.dataset, f"depth {plan.depth}", width, classes, "unfolded")
    assert found.description == ", ".join(facts)
    x = torch.randn(size_of(plan))
    with torch.no_grad():
        assert torch.equal(found.module(x), network(x))


@pytest.mark.parametrize("variant", SMALL, ids=ids)
def test_folded_files_are_recognised(variant):
    plan = make_plan(**variant)
    network = FoldedDiracNet(plan).eval()
    found = zoo.identify(network.state_dict())
    assert (found.module.plan, type(found.module)) == (plan, FoldedDiracNet)
    assert found.description.endswith("classes, folded")
    assert ("ncrelu" in dict(found.module.features.group0.block0.named_children())) == (plan.version == 1)
    x = torch.randn(size_of(plan))
    with torch.no_grad():
        assert torch.equal(found.module(x), network(x))


@pytest.mark.parametrize("depth, width, classes", [(10, 1, 10), (22, 0.25, 100), (16, 2, 3), (28, 0.5, 10)])
def test_any_depth_width_and_classes(depth, width, classes):
    plan = make_plan(depth=depth, width=width, num_classes=classes)
    found = zoo.identify(published(random_network(plan)))
    assert found.module.plan == plan
    assert found.num_classes == found.preprocessing["num_classes"] == classes
    for fact in (f"depth {depth}", "CIFAR", "v2", f"fc has {classes} rows", "group0.block0.conv"):
        assert fact in found.reason


def test_preprocessing_is_the_original_code_s(tensors):
    cifar = zoo.identify(tensors)
    assert cifar.input_shape == (1, 3, 32, 32)
    assert cifar.preprocessing["mean"] == pytest.approx((0.4914, 0.4824, 0.4467), abs=1e-4)
    assert cifar.preprocessing["std"] == pytest.approx((0.2471, 0.2435, 0.2616), abs=1e-4)
    assert cifar.preprocessing["label_names"][3] == "cat"
    imagenet = zoo.identify(published(random_network(make_plan("ImageNet", 18, 0.125))))
    assert imagenet.input_shape == (1, 3, 224, 224)
    assert imagenet.preprocessing["mean"] == (0.485, 0.456, 0.406)
    assert imagenet.preprocessing["crop_pct"] == 0.875
    assert "label_names" not in imagenet.preprocessing


def test_pretrained_cfg_overrules_preprocessing(tensors):
    found = zoo.identify(tensors, {"pretrained_cfg": {"input_size": [3, 40, 40], "mean": [0.5] * 3, "url": "x"}})
    assert found.input_shape == (1, 3, 40, 40)
    assert found.preprocessing["mean"] == [0.5] * 3
    assert found.notes == ["preprocessing taken from the file's pretrained_cfg: input_size, mean"]


def test_blocks_and_channels_that_no_paper_has_are_counted():
    plan = make_plan(depth=10, width=0.5)
    odd = type(plan)("CIFAR", (8, 12, 20), (1, 3, 2), 10, 2)
    found = zoo.identify(published(random_network(odd)))
    assert found.module.plan == odd
    assert "depth 10 (1-3-2 blocks), channels 8-12-20" in found.description


@pytest.mark.parametrize("batches", [torch.tensor(7), torch.tensor([7.0])])
def test_num_batches_tracked_may_be_there(tensors, batches):
    found = zoo.identify({**tensors, "bn.num_batches_tracked": batches})
    assert found.notes == []


def test_deltas_may_be_absent_and_are_made(tensors):
    found = zoo.identify({key: tensor for key, tensor in tensors.items() if not key.startswith("eye")})
    assert torch.equal(found.module.features.group1.block0.conv.delta, tensors["eye16_8_3_3"])
    made = "eye16_16_3_3, eye16_8_3_3, eye32_16_3_3, eye32_32_3_3, eye8_8_3_3"
    assert found.notes == [f"deltas that the file lacks were made: {made}"]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_and_said(tensors, kind):
    found = zoo.identify({key: tensor.to(kind) for key, tensor in tensors.items()})
    assert {tensor.dtype for tensor in found.module.parameters()} == {torch.float32}
    assert found.notes == [f"half-precision weights were widened to float32 ({str(kind)[6:]} in the file)"]


def test_float64_stays_unless_mixed(tensors):
    found = zoo.identify({key: tensor.double() for key, tensor in tensors.items()})
    assert {t.dtype for t in found.module.state_dict().values() if t.is_floating_point()} == {torch.float64}
    mixed = zoo.identify({**tensors, "fc.bias": tensors["fc.bias"].double()})
    assert mixed.module.fc.bias.dtype == torch.float32
    assert mixed.notes == ["1 float64 tensors among others were rounded to float32"]


def test_the_file_s_tensors_are_not_changed(tensors):
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    with torch.no_grad():
        zoo.identify(tensors).module.features.group0.block0.conv.delta.zero_()
    assert all(torch.equal(tensors[key], before[key]) for key in before)


def without(tensors, *names):
    return {key: tensor for key, tensor in tensors.items() if key not in names}


def nan_at_3(tensor):
    return tensor.clone().index_fill_(0, torch.tensor(3), torch.nan)


# What is done to the tensors of a good file, and words of the report.
MISFITS = {
    "missing": (
        lambda t: without(t, "bn.bias", "group1.block1.conv", "group0.block1.alpha"),
        ["3 missing (bn.bias, group0.block1.alpha, group1.block1.conv)."],
    ),
    "last weight": (lambda t: without(t, "group2.block1.conv"), ["1 missing (group2.block1.conv)", "--arch"]),
    "stem": (lambda t: without(t, "conv"), ["1 missing (conv)"]),
    "surplus": (
        lambda t: {**t, "head.weight": torch.ones(2), "eye9_9_3_3": torch.ones(9, 9, 3, 3), "bn.gain": torch.ones(8)},
        ["3 surplus (head.weight, eye9_9_3_3, bn.gain)"],
    ),
    "many": (lambda t: {k: v for k, v in t.items() if "block0.bn" not in k}, ["12 missing (", " and 7 more)"]),
    "shape": (
        lambda t: {**t, "group0.block1.conv": torch.ones(8, 7, 3, 3)},
        ["1 of another shape (group0.block1.conv is [8, 7, 3, 3], wanted [8, 8, 3, 3]"],
    ),
    "classes": (lambda t: {**t, "fc.bias": torch.ones(9)}, ["fc.bias is [9], wanted [10]"]),
    "stem of the other data set": (
        lambda t: {**t, "conv": torch.ones(8, 3, 7, 7)},
        ["conv is [8, 3, 7, 7], wanted [8, 3, 3, 3]"],
    ),
    "delta": (
        lambda t: {**t, "eye8_8_3_3": torch.ones(8)},
        ["1 of another shape (eye8_8_3_3 is [8], wanted [8, 8, 3, 3]"],
    ),
    "integers": (
        lambda t: {**t, "fc.weight": torch.ones(10, 32, dtype=torch.int8)},
        ["1 not floating point (fc.weight is int8)"],
    ),
    "nan": (
        lambda t: {**t, "group1.block0.beta": nan_at_3(t["group1.block0.beta"])},
        ["group1.block0.beta", "nan", "[3]"],
    ),
    "infinite": (lambda t: {**t, "bn.weight": torch.full((8,), torch.inf)}, ["bn.weight", "inf"]),
    "negative variance": (
        lambda t: {**t, "group2.block0.bn.running_var": torch.linspace(1, -0.01, 32)},
        ["group2.block0.bn.running_var is negative", "channel 31"],
    ),
    "group": (
        lambda t: {k: v for k, v in t.items() if not k.startswith("group1")},
        ["groups 0, 2", "0 to 2 (CIFAR)"],
    ),
    "everything at once": (
        lambda t: {**without(t, "bn.bias"), "x": torch.ones(1), "fc.bias": torch.ones(3)},
        ["1 missing (bn.bias); 1 surplus (x); 1 of another shape (fc.bias is [3], wanted [10])."],
    ),
    "a block number that no file has": (
        lambda t: {**t, "group0.block99999999.conv": torch.ones(8, 8, 3, 3)},
        ["tensors are not 100000004 blocks"],
    ),
    "flat convolutions": (
        lambda t: {**t, "group0.block0.conv": torch.ones(8), "group0.block1.conv": torch.ones(8)},
        ["groups 1, 2"],
    ),
}


@pytest.mark.parametrize("damage, words", MISFITS.values(), ids=MISFITS)
def test_a_damaged_file_is_reported_in_its_own_names(tensors, damage, words):
    with pytest.raises(CheckpointError) as caught:
        zoo.identify(damage(tensors), source="net.pth")
    message = str(caught.value)
    assert message.startswith("net.pth")
    assert len(message.splitlines()) <= 2
    for word in words:
        assert word in message


def test_version_1_whose_channels_cannot_be_tiled():
    network = random_network(make_plan(depth=10, width=0.5, version=1))
    tensors = published(network)
    tensors |= {f"group1.block{b}.conv": torch.ones(17, 34 if b else 16, 3, 3) for b in range(2)}
    with pytest.raises(CheckpointError, match="17x16 channels"):
        zoo.identify(tensors)


def test_unknown_keys_are_shown_with_the_way_out():
    keys = [f"trunk.{i}.weight" for i in range(7)]
    with pytest.raises(CheckpointError) as caught:
        zoo.identify({**{key: torch.ones(1) for key in keys}, "fc.bias": torch.ones(1)}, source="r.pth")
    message = str(caught.value)
    assert "trunk.0.weight" in message and "and 3 more" in message
    assert "nearest: DiracNet, 1 of 8 keys fit" in message
    assert "--arch" in message
    with pytest.raises(CheckpointError, match="none comes near"):
        zoo.identify({"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="holds no tensors"):
        zoo.identify({})


def test_a_wide_resnet_of_the_same_authors_is_not_taken_for_a_diracnet():
    keys = ["conv0", "group0.block0.conv0", "group0.block0.bn0.weight", "group0.block0.convdim", "fc.weight", "fc.bias"]
    with pytest.raises(CheckpointError, match="no known architecture"):
        zoo.identify({key: torch.ones(1) for key in keys})


def test_arch_asks_one_family_and_its_arguments_overrule(tensors):
    assert zoo.identify(tensors, arch="diracnet").module.plan.depth == 10
    asked = zoo.identify(tensors, arch="diracnet", arch_args={"depth": 10, "width": 0.5})
    assert "asked for: depth=10, width=0.5" in asked.reason
    with pytest.raises(CheckpointError, match="missing .group0.block2.conv"):
        zoo.identify(tensors, arch="diracnet", arch_args={"depth": 16})
    with pytest.raises(CheckpointError, match="no DiracNet"):
        zoo.identify({"x": torch.ones(1)}, arch="diracnet")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"arch": "lenet"}, "the zoo has diracnet"),
        ({"arch": "diracnet", "arch_args": {"deep": 3}}, "takes no deep; it takes dataset, depth"),
        ({"arch": "diracnet", "arch_args": {"depth": 11}}, "depth 6n"),
        ({"arch": "diracnet", "arch_args": {"depth": "ten"}}, "arch diracnet"),
    ],
)
def test_arguments_that_make_no_network(tensors, arguments, message):
    with pytest.raises(UsageError, match=message):
        zoo.identify(tensors, **arguments)
