"""What trace gives: names, sources, structure, a batch that is symbolic where the network allows; and its refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from foldexport import interpret
from foldexport.errors import ModelError, TraceError, UsageError
from foldexport.trace import bound, trace
from foldexport.trace.rejected import OtherType
from tests.eager import Function, assert_functional, assert_same_as_eager, operators
from tests.statistics import randomise


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)) + x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.layers = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4, 5)

    def forward(self, image):
        x = F.relu(self.stem(image))
        x = self.layers(x)
        return self.head(x.mean((2, 3)))


def network() -> nn.Module:
    return randomise(Network(), 0)


IMAGE = torch.randn(2, 3, 9, 9)


# ---- names


def test_tensors_have_the_users_names():
    module = network()
    graph = assert_same_as_eager(module, IMAGE)
    unused = {f"layers.{i}.bn.num_batches_tracked" for i in range(2)}
    assert set(graph.tensors) == set(module.state_dict()) - unused
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in graph.tensors.items())
    assert graph.input_names == ["image"]


def test_nodes_know_their_module_and_source_line():
    nodes = {node.name: node for node in trace(network(), IMAGE).fx.nodes}
    norm, functional = nodes["batch_norm_1"], nodes["relu"]
    assert norm.meta["module"] == "layers.1.bn" and norm.meta["module_type"] == "BatchNorm2d"
    assert functional.meta["module"] == "" and functional.meta["module_type"] == "Network"
    assert functional.meta["source"].startswith("test_trace.py:") and functional.meta["source"].endswith(" in forward")
    assert tuple(norm.meta["val"].shape[1:]) == (4, 4, 4)


def test_constants_stand_beside_their_first_use():
    nodes = list(trace(network(), IMAGE).fx.nodes)
    for at, node in enumerate(nodes):
        if node.op == "get_attr":
            following = next(other for other in nodes[at:] if other.op != "get_attr")
            assert following in node.users


def test_node_names_are_the_same_in_every_trace():
    names = [[node.name for node in trace(network(), IMAGE).fx.nodes] for _ in range(2)]
    assert names[0] == names[1]


class SharedParts(nn.Module):
    """One convolution called twice, one weight under two names, a slice of a Sequential."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.tied = nn.Conv2d(4, 4, 1)
        self.tied.weight = self.conv.weight
        self.tail = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.register_buffer("offset", torch.randn(4, 1, 1), persistent=False)

    def forward(self, x):
        x = self.conv(self.conv(x)) + self.tied(x)
        return self.tail[1:](x) + self.offset + torch.tensor([0.5])


def test_shared_modules_and_tensors():
    graph = assert_same_as_eager(randomise(SharedParts(), 0), torch.randn(2, 4, 3, 3))
    convolutions = [n for n in graph.fx.nodes if n.op == "call_function" and "conv2d" in n.name]
    assert [n.meta["module"] for n in convolutions] == ["conv", "conv", "tied", "tail.1", "tail.2"]
    assert {n.args[1].target for n in convolutions[:3]} == {"conv.weight"}
    assert "tied.weight" not in graph.tensors and "offset" in graph.tensors


def test_bound_fills_in_the_defaults_of_the_schema():
    graph = trace(network(), IMAGE)
    nodes = {node.name: node for node in graph.fx.nodes}
    stem = bound(nodes["conv2d"])
    assert stem["input"] is nodes["image"] and stem["stride"] == [2, 2]
    assert stem["padding"] == [0, 0] and stem["dilation"] == [1, 1] and stem["groups"] == 1
    assert bound(nodes["batch_norm"])["eps"] == 1e-5 and bound(nodes["mean"])["keepdim"] is False


# ---- structure


class Structured(nn.Module):
    def forward(self, first, second):
        return {"sum": first + second, "rest": [first, (second * 2, None, 3)]}


def test_several_inputs_and_nested_outputs():
    module = Structured().eval()
    inputs = (torch.randn(3, 4), torch.randn(3, 4))
    graph = assert_same_as_eager(module, *inputs)
    assert graph.input_names == ["first", "second"]
    result = pytree.tree_unflatten(interpret.outputs(graph, inputs, None), graph.out_spec)
    assert torch.equal(result["rest"][0], inputs[0]) and result["rest"][1][1:] == (None, 3)


class Variadic(nn.Module):
    def forward(self, first, *others):
        return first + others[0] * others[1]


def test_variadic_inputs_have_names():
    graph = assert_same_as_eager(Variadic().eval(), *torch.randn(3, 2, 4).unbind(0))
    assert graph.input_names[0] == "first" and len(set(graph.input_names)) == 3


class PerChannel(nn.Module):
    def forward(self, x, scale):
        return x * scale.view(-1, 1, 1)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_an_input_without_batch_axis(batch):
    """A vector of 4 scales: its axis is not the batch, not even at a batch of 4."""
    graph = trace(PerChannel().eval(), (torch.randn(batch, 4, 2, 2), torch.randn(4)))
    assert graph.dynamic == {"batch": True}
    x, scale = torch.randn(5, 4, 2, 2), torch.randn(4)
    assert torch.equal(interpret.outputs(graph, (x, scale), None)[0], x * scale.view(-1, 1, 1))


def test_functional_code_casts_and_disabled_gradients():
    def forward(x):
        with torch.no_grad():
            y = F.conv2d(x, torch.ones(2, 4, 1, 1)).float()
        return F.adaptive_avg_pool2d(F.relu_(y), 1).flatten(1)

    graph = assert_same_as_eager(Function(forward).eval(), torch.randn(2, 4, 3, 3))
    assert not any("assert" in name or "wrap" in name for name in operators(graph))


# ---- the batch


def test_a_batch_of_one_is_traced_at_two():
    graph = trace(network(), IMAGE[:1])
    assert graph.dynamic == {"batch": True} and graph.example[0].shape == (2, 3, 9, 9)


def test_a_larger_batch_is_kept():
    assert trace(network(), torch.randn(5, 3, 9, 9)).example[0].shape[0] == 5


def test_a_static_batch_on_request():
    graph = trace(network(), IMAGE[:1], dynamic=False)
    assert graph.dynamic == {"batch": False} and graph.example[0].shape[0] == 1


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.view(4, -1) + 1


class LimitedBatch(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] > 4 else x + 1


@pytest.mark.parametrize("module", [FixedBatch(), LimitedBatch()], ids=["view", "branch"])
def test_a_network_that_fixes_its_batch_is_static_at_its_own(module):
    graph = trace(module.eval(), torch.randn(4, 3, 2))
    assert graph.dynamic == {"batch": False} and graph.example[0].shape == (4, 3, 2)
    x = torch.randn(4, 3, 2)
    assert torch.equal(interpret.outputs(graph, x, None)[0], module(x))


def test_a_network_for_a_batch_of_one_is_static_there():
    class One(nn.Module):
        def forward(self, x):
            return x.view(1, 6) if x.shape[0] == 1 else x.view(4, -1)

    graph = trace(One().eval(), torch.randn(1, 3, 2))
    assert graph.dynamic == {"batch": False} and graph.example[0].shape[0] == 1


# ---- refusals


def test_train_mode_is_refused_by_name():
    module = network()
    module.layers[1].train()
    with pytest.raises(ModelError, match=r"in train mode: 'layers\.1\.conv' \(Conv2d\).*call \.eval\(\)"):
        trace(module, IMAGE)
    module.eval()
    module.drop = nn.Dropout(0.5)
    with pytest.raises(ModelError, match=r"1 of \d+ modules are in train mode: 'drop' \(Dropout\)\."):
        trace(module, IMAGE)
    assert module.drop.training


def test_a_network_on_a_gpu_is_refused_by_name():
    """Its tensors are fake ones, which say "cuda" without one."""
    there, here = nn.Conv2d(3, 4, 3).eval(), nn.Conv2d(3, 4, 3).eval()
    with FakeTensorMode():
        there.weight = nn.Parameter(torch.empty(4, 3, 3, 3, device="cuda"))
        image = torch.empty(1, 3, 8, 8, device="cuda")
    with pytest.raises(UsageError, match=r"'weight' is on cuda:0: .* Call \.cpu\(\) on the network and its inputs"):
        trace(there, IMAGE)
    with pytest.raises(UsageError, match="'input 0' is on cuda:0"):
        trace(here, image)


def test_at_most_five_names_are_given():
    with pytest.raises(ModelError) as caught:
        trace(nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(9))), IMAGE)
    assert str(caught.value).count("Conv2d") == 5 and "and 4 more" in str(caught.value)


@pytest.mark.parametrize("example", [None, (), [1.0], {"image": IMAGE}, (IMAGE, 3)])
def test_an_example_that_is_no_tensor(example):
    with pytest.raises(UsageError, match="give a tensor, or a tuple of the tensors"):
        trace(network(), example)


def test_a_shape_that_the_network_rejects():
    rejected = r"rejects input shape 1x4x32x32: it takes 3 channels, this input has 4.*by --input-shape or --data"
    with pytest.raises(UsageError, match=rejected):
        trace(network(), torch.randn(1, 4, 32, 32))


def test_integers_for_a_network_of_floats():
    with pytest.raises(OtherType, match=r"The input is uint8; the network takes float32") as caught:
        trace(network(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert (caught.value.found, caught.value.wanted) == ("uint8", "float32")


def test_too_few_inputs():
    with pytest.raises(UsageError, match=r"rejects input shape 2x4: .*second"):
        trace(Structured().eval(), torch.randn(2, 4))


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        if x.sum() > 0:
            return x
        return x + 1


def test_an_untraceable_network_is_refused_with_its_line(capfd):
    module = DataDependent().eval()
    with pytest.raises(TraceError) as caught:
        trace(module, torch.randn(2, 3))
    message = str(caught.value)
    assert "cannot trace DataDependent at test_trace.py:" in message and "`if x.sum() > 0:`" in message
    assert "data-dependent" in message and "torch.where" in message
    assert len(message.splitlines()) == 2
    assert capfd.readouterr() == ("", "")
    assert module.calls.item() == 0


def test_the_module_is_not_changed():
    module = network()
    state, text = copy.deepcopy(module.state_dict()), repr(module)
    gradients = [p.requires_grad for p in module.parameters()]
    trace(module, IMAGE)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert repr(module) == text and [p.requires_grad for p in module.parameters()] == gradients


# ---- families


def weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())


def spectral_norm():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())


def transposed():
    return nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2, groups=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.1, True))


def padded():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.Hardswish(inplace=True))


@pytest.mark.parametrize("make", [weight_norm, spectral_norm, transposed, padded], ids=lambda f: f.__name__)
def test_layers(make):
    assert_same_as_eager(randomise(make(), 0), IMAGE)


def test_half_and_double_networks_keep_their_type():
    graph = assert_functional_in(torch.float64)
    assert graph.tensors["stem.weight"].dtype == torch.float64
    assert_functional_in(torch.bfloat16)


def assert_functional_in(dtype: torch.dtype):
    module = network().to(dtype)
    graph = trace(module, IMAGE.to(dtype))
    assert_functional(graph)
    with torch.no_grad():
        assert torch.equal(interpret.outputs(graph, IMAGE.to(dtype), None)[0], module(IMAGE.to(dtype)))
    return graph
