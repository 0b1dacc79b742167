"""Images changed at random before they are trained on: many at a time, each by its own draw.

The functions that change images take what was drawn, so that they can be checked and repeated; :class:`Augmentation`
draws. Images that a network is tested on are left as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def flip(images: Tensor, where: Tensor) -> Tensor:
    """Mirror some images, left for right.

    Args:
        images: [n, channels, height, width].
        where: bool [n]: which.

    Returns:
        The images' shape and dtype.
    """
    return torch.where(where[:, None, None, None], images.flip(-1), images)


def crop(images: Tensor, down: Tensor, right: Tensor, padding: int) -> Tensor:
    """Cut a window of the images' own size out of each image, whose border is first reflected outwards.

    Args:
        images: [n, channels, height, width], of floating point.
        down: int64 [n]: the window's first row in the padded image, from 0 to ``2 * padding``; at ``padding`` the
            image stays where it is.
        right: int64 [n]: the window's first column.
        padding: pixels of reflection on each side, fewer than the image has; the border itself is not repeated.

    Returns:
        The images' shape and dtype.
    """
    height, width = images.shape[-2:]
    if not 0 <= padding < min(height, width):
        raise ValueError(
            f"padding is {padding}; images of {height} x {width} can be reflected by 0 to {min(height, width) - 1} "
            "pixels"
        )
    padded = F.pad(images, (padding,) * 4, mode="reflect") if padding else images
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = right[:, None] + torch.arange(width, device=images.device)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    r"""Turn each image about its middle.

    The value at a pixel is interpolated between the four pixels around the place that it came from,
    :math:`(x, y) \to (x \cos a - y \sin a,\; x \sin a + y \cos a)` with y downwards; what comes from outside of the
    image is 0, the mean colour of images that were normalised.

    Args:
        images: [n, channels, height, width], of floating point.
        degrees: float [n]: counterclockwise.

    Returns:
        The images' shape and dtype.
    """
    angle = torch.deg2rad(degrees.to(images.dtype))
    cosine, sine = angle.cos(), angle.sin()
    stretch = images.shape[-2] / images.shape[-1]  # the grid counts each side from -1 to 1
    zero = torch.zeros_like(angle)
    rows = (cosine, -sine * stretch, zero, sine / stretch, cosine, zero)
    matrices = torch.stack(rows, 1).reshape(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class Drawn(NamedTuple):
    """How each image is to be changed; ``drawn[where]`` are the draws of some."""

    mirrored: Tensor
    """bool [n]."""
    down: Tensor
    """int64 [n]."""
    right: Tensor
    """int64 [n]."""
    degrees: Tensor
    """float32 [n]."""

    def of(self, where: Tensor) -> Drawn:
        """The draws of some images, by position."""
        return Drawn(*(values[where] for values in self))

    def to(self, device: torch.device | str) -> Drawn:
        """The same on a device."""
        return Drawn(*(values.to(device) for values in self))


@dataclass(frozen=True)
class Augmentation:
    """Mirrored, shifted and turned at random, in this order.

    The defaults are those of the class-incremental CIFAR-100 of Dohare et al. (Nature, 2024), whose code gives the
    rotation as a range from 0 to 15 degrees.
    """

    mirror: float = 0.5
    """Probability of a mirrored image."""
    shift: int = 4
    """Pixels by which an image may move in each direction, over its reflection."""
    low: float = 0.0
    """Smallest angle in degrees."""
    high: float = 15.0
    """Largest angle in degrees."""

    def __post_init__(self) -> None:
        if not 0 <= self.mirror <= 1:
            raise ValueError(f"mirror is {self.mirror}; it is a probability, from 0 to 1")
        if self.shift < 0:
            raise ValueError(f"shift is {self.shift}; it is a number of pixels, from 0")
        if not -180 <= self.low <= self.high <= 180:
            raise ValueError(f"low is {self.low} and high {self.high}; angles go from -180 to 180, low to high")

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Draws for ``count`` images, on the generator's device."""
        device = generator.device
        mirrored = torch.rand(count, generator=generator, device=device) < self.mirror
        places = torch.randint(0, 2 * self.shift + 1, (2, count), generator=generator, device=device)
        degrees = self.low + (self.high - self.low) * torch.rand(count, generator=generator, device=device)
        return Drawn(mirrored, places[0], places[1], degrees)

    def __call__(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Images [n, channels, height, width] of floating point, changed as drawn."""
        images = flip(images, drawn.mirrored)
        if self.shift:
            images = crop(images, drawn.down, drawn.right, self.shift)
        if self.low or self.high:
            images = rotate(images, drawn.degrees)
        return images
