"""In-place code of all sorts, as functions of one tensor [N, 4, 4, 4]."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def relu_used_elsewhere(x):
    y = x * 2
    z = F.relu(y, inplace=True)
    return y + 1, z


def shared_sum(x):
    y = x * 2
    z = y
    y += x
    return y * z


def sliced_product(x):
    x = x + 0
    x[:, :2] *= 2
    return x


def selected_sum(x):
    x = x + 0
    x[:, 0].add_(1)
    return x


def view_before_write(x):
    x = x + 0
    y = x.view(x.shape[0], -1)
    x.relu_()
    return y


def view_of_view_written(x):
    x = x + 0
    y = x.transpose(1, 2)[:, 1:3].transpose(1, 2)
    y.mul_(3)
    return x, y


def write_through_reshape(x):
    x = x + 0
    y = x.view(x.shape[0], 2, -1)
    y[:, 1].fill_(7.0)
    return x


def write_through_flatten(x):
    x = x + 0
    x.flatten(1).neg_()
    return x


def write_through_unflatten_and_squeeze(x):
    x = x + 0
    x.unflatten(1, (2, 2)).mul_(2)
    x.unsqueeze(2).squeeze(2).add_(1)
    return x


def write_through_permutation(x):
    x = x + 0
    y = x.permute(0, 2, 3, 1)
    y[..., 1] = 5.0
    return x, x.movedim(1, -1).add_(2), x


def write_through_swaps(x):
    x = x + 0
    x.mT.mul_(2)
    x[0].mT.add_(1)
    x.swapaxes(1, 2)[:, 0] -= 1
    return x


def write_through_diagonal(x):
    x = x + 0
    x.diagonal(0, 2, 3).zero_()
    return x


def write_to_chunks(x):
    x = x + 0
    first, second = x.chunk(2, dim=1)
    first.mul_(2)
    second += first
    return x, second


def write_to_split(x):
    x = x + 0
    a, b = torch.split(x, [1, 3], dim=1)
    b.sub_(a)
    a.add_(1)
    return torch.cat([b, a], 1), x


def write_to_unbound(x):
    x = x + 0
    a, b, *_ = x.unbind(1)
    a.copy_(b)
    b.zero_()
    return x


def narrow_write(x):
    x = x + 0
    x.narrow(2, 1, 2).exp_()
    return x


def siblings(x):
    x = x + 0
    a, b = x[:, :3], x[:, 1:]
    a.mul_(2)
    b.add_(1)
    a.sub_(3)
    return a, b, x


def deep_then_root_then_deep(x):
    x = x + 0
    a = x[:, 1:]
    b = a[:, :, 1:]
    b.mul_(2)
    x.add_(1)
    b.neg_()
    a.abs_()
    return x, a, b


def disjoint_writes(x):
    x = x + 0
    x[:, :, 0] = 1.0
    x[:, :, -1] = 2.0
    x[:, :, :, ::2] = x[:, :, :, 1::2]
    return x


def indexed_writes(x):
    x = x + 0
    x[:, [0, 2]] = 1.0
    x[x > 0.5] = 0.5
    x.masked_fill_(x < 0, -1.0)
    x.index_fill_(1, torch.tensor([3]), 9.0)
    x.clamp_(-0.5, 5.0)
    return x


def broadcast_write(x):
    x = x + 0
    x[:] = torch.arange(4.0).view(4, 1, 1)
    x[:, 1] = 3
    return x


def written_factory(x):
    y = torch.zeros(x.shape[0], 6, *x.shape[2:])
    y[:, 1:5] = x
    y[:, 0] = x.mean(1)
    return y


def written_new_tensor(x):
    y = x.new_empty(x.shape).fill_(2.0)
    z = torch.empty_like(x).copy_(x).mul_(y)
    return z


def promoted(x):
    counts = (x > 0).to(torch.int32)
    counts += torch.ones(4, 1, 1, dtype=torch.int64)
    x = x + 0
    x += torch.full((4, 1, 1), 0.1, dtype=torch.float64)
    x[:, 0] = torch.full((), 0.1, dtype=torch.float64)
    return counts, x


def compared_in_place(x):
    x = x + 0
    y = x.clone()
    y.gt_(0)
    return x * y, y


def input_written(x):
    x.relu_()
    x[:, 0] += 1
    return x


def input_written_and_returned(x):
    y = x * 2
    x.add_(1)
    return x, y, x.sigmoid_()


def dropout_is_its_input(x):
    x = x + 0
    y = F.dropout(x, 0.5, training=False)
    x.relu_()
    return y


def dropout_in_place(x):
    return F.dropout(x + 0, 0.3, training=False, inplace=True) * 2


def contiguous_copies(x):
    x = x + 0
    same, copy = x.contiguous(), x.transpose(1, 2).contiguous()
    x.mul_(2)
    return same, copy


def reshape_copies(x):
    x = x + 0
    copy = x.transpose(1, 2).reshape(x.shape[0], -1)
    view = x.reshape(x.shape[0], -1)
    x.mul_(2)
    return copy, view


def cast_is_its_input(x):
    x = x + 0
    y = x.float()
    x.relu_()
    return y, x.double().add_(1), x


def detached(x):
    x = x + 0
    y = x.detach()
    y.mul_(2)
    return x


def expanded_shape_in_place(x):
    x = x + 0
    y = x.unsqueeze_(1)
    y.add_(1)
    y.squeeze_(1).mul_(2)
    return y


def activations_in_place(x):
    x = x * 3
    for function in (F.relu6, F.leaky_relu, F.silu, F.hardswish, F.elu, F.hardtanh, F.mish, F.hardsigmoid, F.selu):
        x = function(x, inplace=True)
    return torch.sigmoid_(x), F.threshold(x, 0.3, 0.1, inplace=True)


def arithmetic_in_place(x):
    y = x + 0
    y.add_(x, alpha=2).sub_(1).mul_(x).div_(2).neg_().abs_().sqrt_().pow_(2).clamp_min_(0.1).reciprocal_()
    y.addcmul_(x, x, value=0.5).lerp_(x, 0.25).copysign_(x)
    y /= 3
    y //= 2
    y **= 2
    return y


def regions(x):
    x = x + 0
    with torch.no_grad():
        x.relu_()
        y = x[:, :2]
    with torch.enable_grad():
        y.add_(1)
        x[:, 3].mul_(2)
    with torch.autocast("cpu", enabled=False):
        z = x.view(x.shape[0], -1)
        z.sub_(1)
    return x, y, z


CASES = [value for value in list(globals().values()) if getattr(value, "__module__", None) == __name__]
