"""Rows of the table: affine operators behind and in front of what absorbs them."""

from __future__ import annotations

from torch import nn

from tests.fold.layers import Cat, Normalise, Shuffle, chain, conv, conv_bn
from tests.fold.rows import block, bn, normed

BEHIND_CONVOLUTION = {
    "conv_bn": block(lambda: conv_bn(8, 8), conv=1),
    "conv_bn_relu": block(lambda: chain(unit=conv_bn(8, 8), relu=nn.ReLU()), conv=1, relu=1),
    "conv_bn_relu6": block(lambda: chain(unit=conv_bn(8, 8), relu=nn.ReLU6()), conv=1, relu6=1),
    "conv_bn_leaky": block(lambda: chain(unit=conv_bn(8, 8), act=nn.LeakyReLU(0.1)), conv=1, leaky_relu=1),
    "conv_bn_prelu": block(lambda: chain(unit=conv_bn(8, 8), act=nn.PReLU(8)), conv=1, prelu=1),
    "conv_bn_odd_eps": block(lambda: normed(conv(8, 8)).append(nn.BatchNorm2d(8, eps=0.1, affine=False)), conv=1),
    "conv1d_bn": block(lambda: normed(nn.Conv1d(8, 8, 3, padding=1), dims=1), (8, 9), conv=1),
    "conv3d_bn": block(lambda: normed(nn.Conv3d(3, 8, 3, padding=1), dims=3), (3, 4, 5, 6), conv=1),
    "grouped_bn": block(lambda: conv_bn(8, 8, groups=4), conv=1),
    "depthwise_bn": block(lambda: conv_bn(8, 16, groups=8), conv=1),
    "dilated_bn": block(lambda: conv_bn(8, 8, dilation=2, padding=2), conv=1),
    "same_even_bn": block(lambda: normed(nn.Conv2d(8, 8, 4, padding="same")), conv=1),
    "same_odd_bn": block(lambda: normed(nn.Conv2d(8, 8, (3, 5), padding="same", dilation=2)), conv=1),
    "reflect_bn": block(lambda: normed(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), pad=1, conv=1),
    "circular_bn": block(lambda: normed(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")), pad=1, conv=1),
    "transposed_bn": block(lambda: normed(nn.ConvTranspose2d(8, 6, 4, 2, 1), 6), conv_transpose=1),
    "grouped_transposed_bn": block(
        lambda: normed(nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2), 6),
        conv_transpose=1,
    ),
    "transposed1d_bn": block(lambda: normed(nn.ConvTranspose1d(8, 4, 3, groups=4), 4, 1), (8, 9), conv_transpose=1),
    "linear_bn": block(lambda: normed(nn.Linear(16, 8), 8, 1), (16,), linear=1),
    "zero_gamma": block(
        lambda: chain(unit=conv_bn(8, 8), relu=nn.ReLU(), conv=conv(8, 8)), zero=0.3, conv=2, relu=1
    ),
    "conv_bn_maxpool_conv": block(
        lambda: chain(unit=conv_bn(8, 8), pool=nn.MaxPool2d(3, 2, 1), conv=conv(8, 8)), conv=2, max_pool=1
    ),
    "conv_bn_counted_avgpool": block(lambda: chain(unit=conv_bn(8, 8), pool=nn.AvgPool2d(3, 1, 1)), conv=1, avg_pool=1),
    "conv_upsample_bn": block(
        lambda: chain(conv=conv(8, 8), up=nn.Upsample(scale_factor=2, mode="bilinear"), bn=bn(), relu=nn.ReLU()),
        conv=1, upsample=1, relu=1,
    ),
    "conv_pixel_shuffle_bn": block(
        lambda: chain(conv=conv(8, 16), shuffle=nn.PixelShuffle(2), bn=bn(4), relu=nn.ReLU()),
        conv=1, pixel_shuffle=1, relu=1,
    ),
    "shuffle_unit": block(
        lambda: chain(
            reduce=conv_bn(8, 8, 1, groups=2), relu=nn.ReLU(), shuffle=Shuffle(2),
            depthwise=conv_bn(8, 8, groups=8), expand=conv_bn(8, 8, 1, groups=2),
        ),
        conv=3, relu=1, permute=1,
    ),
    "cat_bn": block(
        lambda: chain(cat=Cat(a=conv(8, 8), b=conv(8, 4, 1)), bn=bn(12), relu=nn.ReLU()), conv=2, cat=1, relu=1
    ),
}

BEFORE_CONVOLUTION = {
    "relu_relu_conv": block(lambda: chain(first=nn.ReLU(), second=nn.ReLU(), conv=conv(8, 8)), relu=1, conv=1),
    "relu6_relu_conv": block(lambda: chain(first=nn.ReLU6(), second=nn.ReLU(), conv=conv(8, 8)), relu6=1, conv=1),
    "bn_conv": block(lambda: chain(bn=bn(), conv=conv(8, 8, padding=0)), conv=1),
    "bn_conv_padded": block(lambda: chain(bn=bn(), conv=conv(8, 8)), kept="bn", add=1, conv=1),
    "bn_bn_conv": block(lambda: chain(bn1=bn(), bn2=bn(), conv=conv(8, 8, padding=0)), conv=1),
    "bn_reflect_conv": block(
        lambda: chain(bn=bn(), conv=nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), pad=1, conv=1
    ),
    "bn_relu_conv": block(lambda: chain(bn=bn(), relu=nn.ReLU(), conv=conv(8, 8, padding=0)), clamp=1, conv=1),
    "bn_relu6_conv": block(lambda: chain(bn=bn(), relu=nn.ReLU6(), conv=conv(8, 8, padding=0)), clamp=1, conv=1),
    "bn_prelu_conv": block(
        lambda: chain(bn=bn(), act=nn.PReLU(8), conv=conv(8, 8, padding=0)), kept="bn", add=1, prelu=1, conv=1
    ),
    "bn_leaky_conv": block(
        lambda: chain(bn=bn(), act=nn.LeakyReLU(0.1), conv=conv(8, 8, padding=0)), kept="bn", add=1, prelu=1, conv=1
    ),
    "bn_flatten_linear": block(
        lambda: chain(bn=bn(4), flatten=nn.Flatten(), fc=nn.Linear(100, 6)), (4, 5, 5), linear=1
    ),
    "bn_pool_linear": block(
        lambda: chain(bn=bn(), pool=nn.AdaptiveAvgPool2d(2), flatten=nn.Flatten(), fc=nn.Linear(32, 6)),
        avg_pool=1, linear=1,
    ),
    "bn_counted_avgpool_conv": block(
        lambda: chain(bn=bn(), pool=nn.AvgPool2d(3, 1, 1), conv=conv(8, 8, padding=0)),
        kept="bn", add=1, avg_pool=1, conv=1,
    ),
    "bn_transposed": block(
        lambda: chain(bn=bn(), up=nn.ConvTranspose2d(8, 4, 2, stride=2)), kept="bn", add=1, conv_transpose=1
    ),
    # Stride 2 leaves every second output without a tap, so that the shift reaches only some of them.
    "bn_transposed_k1_s2": block(
        lambda: chain(bn=bn(), up=nn.ConvTranspose2d(8, 4, 1, stride=2)), kept="bn", add=1, conv_transpose=1
    ),
    "bn_transposed_k1": block(lambda: chain(bn=bn(), up=nn.ConvTranspose2d(8, 4, 1)), conv_transpose=1),
    "bn_transposed_cropped": block(lambda: chain(bn=bn(), up=nn.ConvTranspose2d(8, 4, 3, padding=2)), conv_transpose=1),
    "relu_bn_conv": block(lambda: chain(relu=nn.ReLU(), bn=bn(), conv=conv(8, 8, padding=0)), relu=1, conv=1),
    "relu_bn_conv_padded": block(
        lambda: chain(relu=nn.ReLU(), bn=bn(), conv=conv(8, 8)), kept="bn", relu=1, add=1, conv=1
    ),
    "conv_relu_bn_conv": block(
        lambda: chain(conv1=conv(8, 8), relu=nn.ReLU(), bn=bn(), conv2=conv(8, 8, padding=0)), conv=2, relu=1
    ),
    # max(c, 0) + t is max(c + t, t): the bias of the first convolution takes the shift, and no add stays.
    "conv_relu_bn_conv_padded": block(
        lambda: chain(conv1=conv(8, 8), relu=nn.ReLU(), bn=bn(), conv2=conv(8, 8)), conv=2, clamp=1
    ),
    "relu_bn_maxpool_conv": block(
        lambda: chain(relu=nn.ReLU(), bn=bn(), pool=nn.MaxPool2d(2), conv=conv(8, 8, padding=0)),
        signs=False, relu=1, max_pool=1, conv=1,
    ),
    "relu_bn_maxpool_conv_padded": block(
        lambda: chain(relu=nn.ReLU(), bn=bn(), pool=nn.MaxPool2d(2), conv=conv(8, 8)),
        kept="bn", signs=False, relu=1, add=1, max_pool=1, conv=1,
    ),
    # min(-c, 0) is -max(c, 0): the first convolution takes the signs, the bounds follow.
    "conv_relu_bn_maxpool_conv": block(
        lambda: chain(conv1=conv(8, 8), relu=nn.ReLU(), bn=bn(), pool=nn.MaxPool2d(2), conv2=conv(8, 8, padding=0)),
        conv=2, clamp=1, max_pool=1,
    ),
    "normalise_conv": block(lambda: chain(norm=Normalise(), conv=conv(3, 8, padding=0)), (3, 9, 9), conv=1),
    "normalise_conv_padded": block(
        lambda: chain(norm=Normalise(), conv=conv(3, 8)), (3, 8, 8), kept="norm", add=1, conv=1
    ),
}
