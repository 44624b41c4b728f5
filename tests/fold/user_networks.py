"""Ten networks in the style of research repositories, each with a habit that breaks pattern matchers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class FunctionalNet(nn.Module):
    """Functional code: a dictionary of raw parameters, layers as functions, as wide-resnet.pytorch writes them."""

    def __init__(self, widths=(3, 8, 12), num_classes=5):
        super().__init__()
        self.params, self.stats = nn.ParameterDict(), {}
        for i, (n_in, n_out) in enumerate(zip(widths, widths[1:])):
            self.params[f"conv{i}"] = nn.Parameter(torch.randn(n_out, n_in, 3, 3) * (2 / (9 * n_in)) ** 0.5)
            self.params[f"gamma{i}"] = nn.Parameter((torch.rand(n_out) + 0.5) * (-1.0) ** torch.arange(n_out))
            self.params[f"beta{i}"] = nn.Parameter(torch.randn(n_out) * 0.5)
            self.register_buffer(f"mean{i}", torch.randn(n_out) * 0.5)
            self.register_buffer(f"var{i}", torch.rand(n_out) + 0.4)
        self.params["fc_w"] = nn.Parameter(torch.randn(num_classes, widths[-1]) * 0.3)
        self.params["fc_b"] = nn.Parameter(torch.randn(num_classes))
        self.depth = len(widths) - 1

    def forward(self, x):
        def block(x, i, stride):
            o = F.conv2d(x, self.params[f"conv{i}"], None, stride, 1)
            o = F.batch_norm(o, getattr(self, f"mean{i}"), getattr(self, f"var{i}"), self.params[f"gamma{i}"],
                             self.params[f"beta{i}"], training=self.training)  # fmt: skip
            return F.relu(o, inplace=True)

        for i in range(self.depth):
            x = block(x, i, stride=2 if i else 1)
        x = F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)
        return F.linear(x, self.params["fc_w"], self.params["fc_b"])


class AliasedLists(nn.Module):
    """The same layers under three names: attributes, a ModuleList, and a plain list of pairs."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.layers = nn.ModuleList([self.conv1, self.bn1, self.conv2, self.bn2])
        self.stages = [(self.layers[i], self.layers[i + 1]) for i in range(0, len(self.layers), 2)]
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x):
        for conv, bn in self.stages:
            x = F.relu(bn(conv(x)))
        return self.head(x).mean(dim=[2, 3])


class CalledOften(nn.Module):
    """A recurrent convolution: one block called three times, another once for two inputs, and one that never is."""

    def __init__(self, width=8, steps=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.cell, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.aux = nn.Sequential(nn.Conv2d(width, 2, 1), nn.BatchNorm2d(2))  # of the training loss only
        self.proj = nn.Conv2d(width, 4, 1)
        self.proj_bn = nn.BatchNorm2d(4)
        self.steps = steps

    def forward(self, x):
        x = self.stem(x)
        for _ in range(self.steps):
            x = torch.relu(self.norm(self.cell(x)))
        one, two = self.proj_bn(self.proj(x)), self.proj_bn(self.proj(F.avg_pool2d(x, 2)))
        if self.training:
            return one, two, self.aux(x)
        return one, two


class TensorFlowPadding(nn.Module):
    """TensorFlow's "SAME": zeros at the right and bottom only, put between a batch norm and a strided convolution."""

    def __init__(self):
        super().__init__()
        self.conv_a, self.bn_a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.bn_pre = nn.BatchNorm2d(8)
        self.conv_b, self.bn_b = nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.conv_c = nn.Conv2d(8, 4, 3, stride=2)

    def forward(self, x):
        x = self.bn_a(self.conv_a(x))
        x = self.bn_b(self.conv_b(F.pad(x, (0, 1, 0, 1))))
        x = self.bn_pre(F.relu(x))
        return self.conv_c(F.pad(x, [0, 1, 0, 1], "constant", 0.0))


class PReLUFace(nn.Module):
    """A face embedding's head (IR-SE style): PReLU behind batch norm, and a batch norm in front of the convolution."""

    def __init__(self, width=8):
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.PReLU(width),
            nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.shortcut_layer = nn.MaxPool2d(1, 2)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(width), nn.Dropout(0.5), nn.Flatten(), nn.Linear(width * 36, 16), nn.BatchNorm1d(16, affine=False)
        )

    def forward(self, x):
        x = self.input_layer(x)
        x = self.res_layer(x) + self.shortcut_layer(x)
        return F.normalize(self.output_layer(x))


class DenseBlock(nn.Module):
    """DenseNet's habit: features in a growing list, concatenated before the batch norm that reads them all."""

    def __init__(self, growth=4, layers=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        for i in range(layers):
            self.add_module(f"norm{i}", nn.BatchNorm2d(8 + i * growth))
            self.add_module(f"conv{i}", nn.Conv2d(8 + i * growth, growth, 3, padding=1, bias=False))
        self.layers = layers
        self.norm_last, self.fc = nn.BatchNorm2d(8 + layers * growth), nn.Linear(8 + layers * growth, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for i in range(self.layers):
            h = torch.cat(features, 1)
            h = F.relu(getattr(self, f"norm{i}")(h), inplace=True)
            features.append(getattr(self, f"conv{i}")(h))
        out = F.relu(self.norm_last(torch.cat(features, 1)), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(out, (1, 1)).squeeze(3).squeeze(2))


class OddEps(nn.Module):
    """Batch norms without gamma and beta, each with an eps of its own, ported from three frameworks."""

    def __init__(self):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3, affine=False)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8, eps=0.3, affine=False)
        self.c3, self.n3 = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6, eps=1.001e-5, affine=False, momentum=None)

    def forward(self, x):
        x = F.elu(self.n1(self.c1(x)))
        x = F.hardtanh(self.n2(self.c2(x)), -0.5, 2.0)
        return torch.tanh(self.n3(self.c3(x)))


class MaxoutPool(nn.Module):
    """Maxout over channels by a 3-d pool on a 4-d tensor: ``[N, C, H, W]`` read as ``[C, D, H, W]`` without a batch."""

    def __init__(self, pieces=2):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.pool = nn.MaxPool3d((pieces, 2, 2), stride=(pieces, 2, 2))
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)
        self.mean = nn.AvgPool3d((1, 2, 2))
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.pool(self.bn1(self.conv1(x)))
        return self.out(self.mean(self.bn2(self.conv2(x))))


class Transposed(nn.Module):
    """Activations that are views: an axial branch with height and width exchanged, slices with steps, no .contiguous()."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.rows, self.bn_rows = nn.Conv2d(width, width, (1, 5), padding=(0, 2)), nn.BatchNorm2d(width)
        self.cols, self.bn_cols = nn.Conv2d(width, width, (1, 5), padding=(0, 2)), nn.BatchNorm2d(width)
        self.mlp, self.ln = nn.Linear(width, 4), nn.LayerNorm(4)

    def forward(self, x):
        x = self.bn(self.stem(x))[:, :, ::2, 1::2]
        rows = self.bn_rows(self.rows(x))
        cols = self.bn_cols(self.cols(x.transpose(2, 3))).transpose(2, 3)
        x = F.relu(rows + cols).permute(0, 2, 3, 1)
        return self.ln(self.mlp(x)).permute(0, 3, 1, 2)


class HidesModules(nn.Module):
    """A class that keeps its layers in ``self.modules``, which hides ``nn.Module.modules``."""

    def __init__(self, width=8, depth=2):
        super().__init__()
        self.modules = []
        n_in = 3
        for i in range(depth):
            conv, bn = nn.Conv2d(n_in, width, 3, padding=1), nn.BatchNorm2d(width)
            self.add_module(f"conv_{i}", conv)
            self.add_module(f"bn_{i}", bn)
            self.modules.append((conv, bn))
            n_in = width
        self.last = nn.Conv2d(width, 4, 1)

    def forward(self, x):
        for conv, bn in self.modules:
            x = F.leaky_relu(bn(conv(x)), 0.1)
        return self.last(x)
