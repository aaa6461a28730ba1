"""Coordinates from which a lower bound of the distance of two points follows.

They are coordinates along a few orthonormal directions, so no two points are nearer to each other
than their coordinates are, whatever the directions. Along the principal components of the points
the bound is as tight as their share of the variance lets it be.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE = 1024  # points that the directions are computed from
ITERATIONS = 3
BLOCK = 1024  # points at a time: the temporaries stay in cache


class Axes(NamedTuple):
    """Where coordinates are measured from and along what, in float64."""

    origin: Tensor  # (D,)
    directions: Tensor  # (D, count), orthonormal columns; those past D are zero


def principal_axes(points: Tensor, count: int) -> Axes:
    """Axes for `count` coordinates of points like these (N, D).

    The principal components are found by subspace iteration: all eigenvectors of a D x D matrix
    would take longer than everything that the bound saves.
    """
    some = points[:: -(-len(points) // SAMPLE)]
    origin = some.double().mean(0)
    some = (some - origin).float()
    dim = some.shape[1]
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(dim, min(dim, count), generator=generator).to(some.device)
    for _ in range(ITERATIONS):
        directions = torch.linalg.qr(some.T @ (some @ directions)).Q
    directions = torch.linalg.qr(directions.double()).Q  # orthonormal to the last digit
    return Axes(origin, torch.nn.functional.pad(directions, (0, max(0, count - dim))))


def coordinates(points: Tensor, axes: Axes) -> Tensor:
    """(N, D) -> (N, count) float32. In float64, so that only the last step rounds."""
    found = points.new_empty(len(points), axes.directions.shape[1], dtype=torch.float32)
    for to, block in zip(found.split(BLOCK), points.split(BLOCK), strict=True):
        to.copy_((block.double() - axes.origin) @ axes.directions)
    return found


def rounding(points: Tensor, found: Tensor) -> float:
    """How far rounding can move the coordinates `found` of points (N, D) like the axes' own.

    Rounded to float32, all of a point's together are off by at most 2^-24 of their norm. Before,
    in float64, a sum of D terms is off by at most D 2^-53 |x - o|, and |x - o| is at most 2 sqrt(D)
    times the largest element. Twice of both, and what stands above an underflow in a square.
    """
    if not len(points):
        return 0.0
    dim, count = points.shape[1], found.shape[1]
    largest = float(torch.maximum(*map(torch.abs, points.aminmax())))
    of_sums = count**0.5 * dim**1.5 * 2.0**-51 * largest
    return 2.0**-23 * float(found.norm(dim=1).amax()) + of_sums + 1e-18


def in_blocks(found: Tensor, size: int = 16) -> Tensor:
    """(N, count) -> (N / size rounded up, count, size): one coordinate of a block is contiguous."""
    found = torch.nn.functional.pad(found, (0, 0, 0, -len(found) % size))
    return found.unflatten(0, (-1, size)).mT.contiguous()
