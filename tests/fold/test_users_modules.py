"""What is refused, what is left alone, and what can be done with the folded module."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foldexport
from foldexport.errors import ModelError
from tests.fold.branches import RepVGGBlock
from tests.fold.checks import assert_kept, assert_same, fold64, inputs, operators, relative_error
from tests.fold.layers import chain, conv, conv_bn
from tests.fold.residuals import PreactivationBlock
from tests.statistics import randomise

SHAPE = (3, 8, 8)
EXAMPLE = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)


def small() -> nn.Sequential:
    """Convolution, batch norm, ReLU, average pool, linear."""
    layers = chain(
        unit=conv_bn(3, 8), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(8, 5)
    )
    return randomise(layers, 0)


class Noisy(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.3)


class Dynamic(nn.Module):
    """A convolution whose weight is made from its input (Jia et al. 2016, dynamic filter networks)."""

    def __init__(self):
        super().__init__()
        self.make = nn.Linear(8, 8 * 8 * 9)

    def forward(self, x):
        weight = self.make(x.mean((0, 2, 3))).view(8, 8, 3, 3)
        return F.conv2d(x, weight, padding=1)


def test_a_dropout_left_on_is_refused_by_name():
    with pytest.raises(ModelError, match=r"(?s)noise.*dropout|dropout.*noise"):
        foldexport.fold(chain(unit=conv_bn(3, 8), noise=Noisy()).eval(), EXAMPLE)


def test_a_module_in_train_mode_is_refused_by_name():
    module = small()
    module.unit.bn.train()
    with pytest.raises(ModelError, match=r"unit\.bn"):
        foldexport.fold(module, EXAMPLE)
    assert module.unit.bn.training and not module.training


def test_a_whole_network_in_train_mode_is_refused():
    with pytest.raises(ModelError, match="eval"):
        foldexport.fold(small().train(), EXAMPLE)


def test_input_dependent_weights_are_kept_by_name():
    module = randomise(chain(unit=conv_bn(3, 8), dynamic=Dynamic(), tail=conv_bn(8, 4)), 0).double()
    folded = fold64(module, SHAPE)
    counts = operators(folded.counts_after)
    assert (counts["conv"], counts["linear"], counts["batch_norm"]) == (3, 1, 0)
    assert_same(folded, module, SHAPE)
    assert_kept(folded, "dynamic")


def test_the_given_module_is_left_as_it_was():
    module = small()
    calls: list[torch.Size] = []
    module.fc.register_forward_hook(lambda layer, args, output: calls.append(output.shape))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    flags = [(name, layer.training) for name, layer in module.named_modules()]
    requires = [(name, value.requires_grad) for name, value in module.named_parameters()]
    hooks = list(module.fc._forward_hooks)
    foldexport.fold(module, EXAMPLE)
    assert list(module.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert [(name, layer.training) for name, layer in module.named_modules()] == flags
    assert [(name, value.requires_grad) for name, value in module.named_parameters()] == requires
    assert list(module.fc._forward_hooks) == hooks
    assert all(value.grad is None for value in module.parameters())


def test_folding_twice_gives_the_same_weights():
    first, second = (foldexport.fold(small(), EXAMPLE).module.state_dict() for _ in range(2))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_folded_module_has_the_dtype_of_the_given_one(dtype: torch.dtype):
    folded = foldexport.fold(small().to(dtype), EXAMPLE.to(dtype))
    assert {value.dtype for value in folded.module.state_dict().values()} == {dtype}
    assert folded.module(EXAMPLE.to(dtype)).dtype == dtype


def test_a_module_without_weights_keeps_the_dtype_of_its_example():
    class Scaled(nn.Module):
        def forward(self, x):
            return (x * 0.3).relu() + 0.1

    example = EXAMPLE.double()
    folded = foldexport.fold(Scaled().eval(), example)
    assert relative_error(folded.module(example), Scaled()(example)) < 1e-14


def test_a_chain_is_a_sequential_with_the_names_of_the_user():
    folded = foldexport.fold(small(), EXAMPLE)
    assert isinstance(folded.module, nn.Sequential)
    assert list(folded.module.state_dict()) == ["unit.conv.weight", "unit.conv.bias", "fc.weight", "fc.bias"]
    assert not any(layer.training for layer in folded.module.modules())


@pytest.mark.parametrize("copied", [
    copy.deepcopy,
    lambda module: pickle.loads(pickle.dumps(module)),
])
@pytest.mark.parametrize("residual", [False, True])
def test_the_folded_module_can_be_copied_and_pickled(copied, residual: bool):
    module = small()
    if residual:
        module = randomise(nn.Sequential(RepVGGBlock(3, 8), PreactivationBlock(8)), 0)
    folded = foldexport.fold(module, EXAMPLE)
    assert torch.equal(copied(folded.module)(EXAMPLE), folded.module(EXAMPLE))


def test_the_state_of_the_folded_module_survives_a_file():
    folded = foldexport.fold(small(), EXAMPLE)
    file = io.BytesIO()
    torch.save(folded.module.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(folded.module)
    with torch.no_grad():
        for value in again.parameters():
            value.zero_()
    again.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(again(EXAMPLE), folded.module(EXAMPLE))


def test_the_folded_module_can_be_fine_tuned():
    folded = foldexport.fold(small(), EXAMPLE)
    parameters = dict(folded.module.named_parameters())
    assert set(parameters) == set(folded.module.state_dict())
    assert all(value.requires_grad for value in parameters.values())
    optimizer = torch.optim.SGD(parameters.values(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = folded.module(EXAMPLE).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in parameters.values())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_training_the_folded_module_does_not_touch_the_given_one():
    module = small()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    folded = foldexport.fold(module, EXAMPLE)
    with torch.no_grad():
        for value in folded.module.parameters():
            value.add_(1.0)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_one_fold_serves_every_batch_in_float32():
    module = small()
    folded = foldexport.fold(module, EXAMPLE)
    for batch in (1, 3, 7):
        (example,) = inputs([SHAPE], batch, dtype=torch.float32)
        assert relative_error(folded.module(example), module(example)) < 1e-5


def test_an_example_of_batch_one_serves_other_batches_as_well():
    module = small()
    folded = foldexport.fold(module, EXAMPLE[:1])
    assert relative_error(folded.module(EXAMPLE), module(EXAMPLE)) < 1e-5


def test_every_folded_batch_norm_is_in_the_ledger():
    folded = foldexport.fold(small(), EXAMPLE)
    (entry,) = [entry for entry in folded.ledger if entry.module == "unit.bn"]
    assert (entry.status, entry.into) == ("folded", "unit.conv")
    assert [entry for entry in folded.ledger if entry.status == "kept"] == []


def test_without_a_certificate_nothing_is_run():
    folded = foldexport.fold(chain(conv=conv(3, 4)).eval(), EXAMPLE, certify=False)
    assert folded.certificate is None


def test_names_that_end_a_string_in_python_source():
    """torch.fx writes a module's name into the source of ``forward``; the ledger keeps the user's own."""
    odd = "a\"b'c\\d\n"
    module = nn.Sequential()
    module.add_module(odd, nn.Conv2d(SHAPE[0], 4, 3))
    module.add_module(f"{odd}bn", nn.BatchNorm2d(4))
    folded = foldexport.fold(randomise(chain(body=module), 0), EXAMPLE)
    assert folded.certificate.ok and [entry.module for entry in folded.ledger] == [f"body.{odd}bn"]
