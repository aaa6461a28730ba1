"""Coordinates from which a lower bound of the distance of two points follows.

They are coordinates along a few orthonormal directions, so no two points are nearer to each other
than their coordinates are, whatever the directions; along the principal components of the points
the bound is nearly tight.
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
    directions: Tensor  # (D, count), orthonormal columns, or zeros past D


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
        to.copy_(block.double().sub_(axes.origin) @ axes.directions)
    return found


def largest_norm(found: Tensor) -> float:
    """Of coordinates (N, count): that of the point farthest from the origin."""
    return float(found.norm(dim=1).amax()) if len(found) else 0.0


def slack(largest: float) -> float:
    """How much rounding can add to the distance of two points' coordinates.

    A coordinate is off by at most 2^-24 of its size, so all of a point's together by 2^-24 of their
    norm, and a distance by 2^-23 R, with R the largest norm: 1e-6 R leaves room for what float64
    rounds before. 1e-18 stands above what underflows in a square.
    """
    return 1e-6 * largest + 1e-18


def in_blocks(found: Tensor, size: int = 16) -> Tensor:
    """(N, count) -> (N / size rounded up, count, size): one coordinate of a block is contiguous."""
    found = torch.nn.functional.pad(found, (0, 0, 0, -len(found) % size))
    return found.unflatten(0, (-1, size)).mT.contiguous()
