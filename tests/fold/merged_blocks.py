"""Rows of the table: branches and sequences that one convolution computes, and those where it would cost more."""

from __future__ import annotations

from torch import nn

from tests.fold.branches import ACBlock, DiverseBranchBlock, RepVGGBlock, inception, mobileone
from tests.fold.layers import Cat, Sum, chain, conv, conv_bn
from tests.fold.rows import block, bn

MERGED = {
    "repvgg": block(lambda: RepVGGBlock(8, 8), conv=1, relu=1),
    "repvgg_wider": block(lambda: RepVGGBlock(8, 16), conv=1, relu=1),
    "repvgg_strided": block(lambda: RepVGGBlock(8, 8, stride=2), conv=1, relu=1),
    "repvgg_grouped": block(lambda: RepVGGBlock(8, 8, groups=4), conv=1, relu=1),
    "acnet": block(lambda: ACBlock(8, 8), conv=1, relu=1),
    "acnet_strided": block(lambda: ACBlock(8, 12, 2), conv=1, relu=1),
    "dbb": block(lambda: DiverseBranchBlock(8, 8), conv=1, relu=1),
    "dbb_strided": block(lambda: DiverseBranchBlock(8, 16, stride=2), conv=1, relu=1),
    "dbb_5x5": block(lambda: DiverseBranchBlock(6, 6, kernel=5), (6, 10, 10), conv=1, relu=1),
    "mobileone": block(lambda: mobileone(8, 8), conv=2, relu=2),
    "mobileone_strided": block(lambda: mobileone(8, 16, stride=2), conv=2, relu=2),
    "x_plus_conv": block(lambda: Sum(x=nn.Identity(), conv=conv(8, 8)), conv=1),
    "x_plus_depthwise": block(lambda: Sum(x=nn.Identity(), conv=conv(8, 8, 5, groups=8)), conv=1),
    "conv_plus_average": block(lambda: Sum(conv=conv(8, 8), pool=nn.AvgPool2d(3, 1, 1)), conv=1),
    "conv_plus_clipped_average": block(
        lambda: Sum(conv=conv(8, 8), pool=nn.AvgPool2d(3, 1, 1, count_include_pad=False)), conv=1, avg_pool=1, add=1
    ),
    "dilated_plus_pointwise": block(lambda: Sum(a=conv(8, 8, dilation=2, padding=2), b=conv(8, 8, 1)), conv=1),
    "non_square_branches": block(lambda: Sum(a=conv_bn(8, 8, (5, 3)), b=conv_bn(8, 8, (1, 3)), c=bn()), conv=1),
    "even_branches": block(
        lambda: Sum(a=conv(8, 8, 4, stride=2, padding=1), b=conv(8, 8, 2, stride=2, padding=0)), conv=1
    ),
    "pointwise_into_padded": block(
        lambda: chain(wide=conv(16, 64, 1), dense=conv(64, 16)), (16, 8, 8), conv=1
    ),
    "pointwise_bias_into_unpadded": block(
        lambda: chain(wide=conv_bn(16, 64, 1), dense=conv(64, 16, padding=0)), (16, 8, 8), conv=1
    ),
    "pointwise_strided_into_conv": block(
        lambda: chain(wide=conv(16, 64, 1, stride=2), dense=conv(64, 16, stride=2)), (16, 16, 16), conv=1
    ),
    "conv_into_pointwise": block(lambda: chain(dense=conv_bn(16, 64), narrow=conv(64, 16, 1)), (16, 8, 8), conv=1),
    "linear_linear": block(lambda: chain(wide=nn.Linear(16, 64), narrow=nn.Linear(64, 16)), (16,), linear=1),
    "linear_bn_linear": block(
        lambda: chain(wide=nn.Linear(16, 64), bn=nn.BatchNorm1d(64), narrow=nn.Linear(64, 16)), (16,), linear=1
    ),
    "conv_avgpool": block(lambda: chain(conv=conv(8, 8), pool=nn.AvgPool2d(2)), (8, 16, 16), conv=1),
    "pointwise_avgpool": block(
        lambda: chain(conv=conv(16, 8, 1, bias=True), pool=nn.AvgPool2d(2)), (16, 16, 16), avg_pool=1, conv=1
    ),
    "upsample_pointwise": block(
        lambda: chain(up=nn.Upsample(scale_factor=2), conv=conv(16, 8, 1, bias=True)), (16, 8, 8), conv=1, upsample=1
    ),
    "cat_of_convs": block(lambda: chain(cat=Cat(a=conv_bn(8, 8), b=conv_bn(8, 4)), relu=nn.ReLU()), conv=1, relu=1),
    "inception": block(lambda: inception(8), conv=4, relu=4, avg_pool=1, cat=1),
}

REFUSED_MERGES = {
    "pointwise_bias_into_padded": block(
        lambda: chain(wide=conv_bn(16, 64, 1), dense=conv(64, 16)), (16, 8, 8), kept="dense", conv=2
    ),
    "pointwise_bottleneck": block(
        lambda: chain(narrow=conv(64, 8, 1), dense=conv(8, 64)), (64, 8, 8), kept="dense", conv=2
    ),
    "linear_bottleneck": block(
        lambda: chain(narrow=nn.Linear(64, 8), wide=nn.Linear(8, 64)), (64,), kept="wide", linear=2
    ),
    "cross": block(lambda: Sum(vertical=conv(8, 8, (3, 1)), horizontal=conv(8, 8, (1, 3))), conv=2, add=1),
    "two_dilations": block(lambda: Sum(near=conv(8, 8), far=conv(8, 8, dilation=2, padding=2)), conv=2, add=1),
}
