"""`nearest_neighbors`: exact neighbours in PatchCore's bank of patches."""

from typing import NamedTuple

import torch
from torch import Tensor

from spd_fast import reference_patchcore as reference
from spd_fast.errors import InputError
from spd_fast.ops.backends import (
    OPERATIONS,
    call,
    native,
    native_backend,
    not_on_cpu,
    reference_backend,
    select,
    thread_count,
)
from spd_fast.ops.bounds import Axes, coordinates, in_blocks, principal_axes, rounding
from spd_fast.ops.kcenter import check_points

BOUNDS = 32  # coordinates; more of them rule out more items of the bank, but cost more themselves


class Bank(NamedTuple):
    """Points to be searched, with what makes searching them fast; see `prepare_bank`."""

    points: Tensor  # (N, D) float32
    origin: Tensor  # (D,) float64: `spd_fast.ops.bounds.Axes`
    directions: Tensor  # (D, BOUNDS) float64
    blocks: Tensor  # (N / 16 rounded up, BOUNDS, 16) float32: the points' coordinates
    moved: float  # how far rounding can have moved these


def prepare_bank(points: Tensor) -> Bank:
    """Prepare (N, D) float32 points to be searched: once, about as long as a D x D eigenproblem.

    Raises:
        InputError: wrong shape or dtype, or points that are not finite.
    """
    check_points("bank", points)
    axes = principal_axes(points, BOUNDS)
    found = coordinates(points, axes)
    return Bank(points.contiguous(), *axes, in_blocks(found), rounding(points, found))


def nearest_neighbors(
    queries: Tensor, bank: Bank, k: int = 1, *, threads: int = 0, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest points of a bank by Euclidean distance, exact.

    Of equally near points the one of lower index comes first. All backends find the same points: a
    distance is the one that `reference_patchcore.squared_distances` defines. Norms are not
    subtracted from each other, so small distances keep all their digits.

    Args:
        queries: (Q, D) float32, finite.
        bank: of `prepare_bank`.
        k: 1..N.
        threads: CPU threads; 0 = torch.get_num_threads().
        backend: "reference", "native" or "auto"; see `spd_fast.ops.backends`.

    Returns:
        distances (Q, k) float32, ascending, not squared; indices (Q, k) int64 into the bank.

    Raises:
        InputError: an argument has the wrong shape, dtype or range; the message names it.
    """
    return call("nearest_neighbors", _run, queries, *bank, k, threads, backend)


def _run(
    queries: Tensor,
    points: Tensor,
    origin: Tensor,
    directions: Tensor,
    blocks: Tensor,
    moved: float,
    k: int = 1,
    threads: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    if queries.ndim != 2 or queries.shape[1] != len(origin):
        raise InputError(
            f"queries must be (Q, {len(origin)}) as the bank is, got {tuple(queries.shape)}"
        )
    if not 1 <= k <= len(points):
        raise InputError(f"k must be 1..{len(points)}, as the bank has so many points; got {k}")
    if len(queries):
        check_points("queries", queries)
    bank = Bank(points, origin, directions, blocks, moved)
    squared, indices = select("nearest_neighbors", backend, queries, bank).function(
        queries, bank, k, threads
    )
    return squared.sqrt_(), indices


_op = torch.library.custom_op("spd_fast::nearest_neighbors", _run, mutates_args=())


@_op.register_fake
def _(queries, points, origin, directions, blocks, moved, k=1, threads=0, backend=None):
    shape = (len(queries), k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


def _nearest_native(queries, bank, k, threads) -> tuple[Tensor, Tensor]:
    found = coordinates(queries, Axes(bank.origin, bank.directions))
    squared = torch.empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    native.nearest_neighbors(
        queries.contiguous().numpy(),
        bank.points.numpy(),
        found.numpy(),
        bank.blocks.numpy(),
        bank.moved + rounding(queries, found),
        squared.numpy(),
        indices.numpy(),
        thread_count(threads),
    )
    return squared, indices


def _nearest_reference(queries, bank, k, threads) -> tuple[Tensor, Tensor]:
    return reference.nearest_neighbors(queries, bank.points, k)


OPERATIONS["nearest_neighbors"] = (
    native_backend(_nearest_native, lambda queries, bank: not_on_cpu([queries, bank.points])),
    reference_backend(_nearest_reference),
)
