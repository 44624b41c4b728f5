"""What a folded node stores of the training graph: the claims that the certificate tries, one by one.

A folded tensor usually is one training value but for an affine. A widened one, of a chain without skip connections, holds
several side by side along its channels; some of them only as an image: every second position, one sign, one half.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Image:
    """What of a training value v ``[N, C, *space]`` is carried along:

        image = scale ⊙ v[:, index, ::stride] + shift,  and  max(·, 0) of it where ``rectified``.

    index: channels of v, ``[K]``; scale, shift: float64 ``[K]``; stride: one step per spatial axis. terms: the size of what
    was added up to the shift, ``[K]``; None where that is its own.
    """

    index: Tensor
    scale: Tensor
    shift: Tensor
    stride: tuple[int, ...] = ()
    rectified: bool = False
    terms: Tensor | None = None

    def of(self, value: Tensor) -> Tensor:
        """The image ``[N, K, *space]`` of a training value."""
        steps = (slice(None), slice(None), *(slice(None, None, step) for step in self.stride))
        result = _along(self.scale, value) * value.index_select(1, self.index)[steps] + _along(self.shift, value)
        return result.clamp_min(0.0) if self.rectified else result

    def offsets(self, rank: int) -> Tensor:
        """``[1, K, 1, …]``: beside the image's own size, the size at which it was rounded."""
        size = self.shift.abs() if self.terms is None else self.terms
        return size.reshape((1, -1) + (1,) * (rank - 2))


@dataclass(frozen=True, eq=False)
class Record:
    """A training value in terms of a folded node: ``v = scale ⊙ s + shift``.

    value: name of the node in the training graph. scale, shift: float64, broadcastable to v. Channels with scale 0 carry no
    information of s. usable: where the record holds (None: everywhere).
    channels: of s that it is about, ``[K]`` along axis 1 (None: all); s above then is ``s[:, channels]``.
    image: what of v they are (None: v itself); v above then is its image.
    """

    value: str
    scale: Tensor
    shift: Tensor
    usable: Tensor | None = None
    channels: Tensor | None = None
    image: Image | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it relates all of the stored tensor to all of the training value."""
        return self.channels is None and self.image is None

    def part(self, stored: Tensor) -> Tensor:
        """The channels of a stored tensor that it is about."""
        return stored if self.channels is None else stored.index_select(1, self.channels)

    def seen(self, value: Tensor) -> Tensor:
        """The training value, or its image."""
        return value if self.image is None else self.image.of(value)


def _along(vector: Tensor, like: Tensor) -> Tensor:
    """``[K]`` along axis 1 of a tensor of the rank of ``like``."""
    return vector.to(like.dtype).reshape((1, -1) + (1,) * (like.dim() - 2))

