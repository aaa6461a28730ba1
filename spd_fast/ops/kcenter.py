"""`greedy_kcenter`: which points PatchCore keeps as its coreset."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

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
)

SAMPLE = 128  # points that tell where the bytes of csrc/bytes.h have to reach


def greedy_kcenter(
    points: Tensor,
    k: int,
    start: int = 0,
    *,
    progress: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Greedy k-center (Gonzalez 1985), PatchCore's coreset (Roth et al. 2022, section 3.2).

    After `start`, each pick is the point that is farthest from all picked so far, of equals the one
    of lowest index; a point is picked once. All backends pick the same points in the same order:
    a distance is the one that `reference_patchcore.squared_distances` defines, operation by
    operation.

    Args:
        points: (N, D) float32, finite.
        k: how many to pick, 1..N.
        start: index of the first pick.
        progress: show a progress bar.
        backend: "reference", "native" or "auto"; see `spd_fast.ops.backends`.

    Returns:
        (k,) int64 indices in the order of the picks.

    Raises:
        InputError: an argument has the wrong shape, dtype or range; the message names it.
    """
    return call("greedy_kcenter", _run, points, k, start, progress, backend)


def _run(
    points: Tensor, k: int, start: int = 0, progress: bool = False, backend: str | None = None
) -> Tensor:
    check_shape("points", points)
    if not 1 <= k <= len(points):
        raise InputError(f"k must be 1..{len(points)}, as there are so many points; got {k}")
    if not 0 <= start < len(points):
        raise InputError(f"start must be 0..{len(points) - 1}, the index of a point; got {start}")
    chosen = select("greedy_kcenter", backend, points)
    with tqdm(total=k, desc="coreset", unit="point", delay=1, disable=not progress) as bar:
        return chosen.function(points, k, start, lambda done: bar.update(done - bar.n))


_op = torch.library.custom_op("spd_fast::greedy_kcenter", _run, mutates_args=())


@_op.register_fake
def _(points, k, start=0, progress=False, backend=None) -> Tensor:
    return points.new_empty(k, dtype=torch.int64)


LARGEST = 1e15  # squares of differences must stay finite in float32
MOST_COORDINATES = 65536  # for the margins of csrc/dist2.h and the 32 bits of csrc/bytes.h


def check_points(name: str, points: Tensor) -> None:
    """Refuse what distances cannot be computed of; `name` is what the argument is called."""
    check_shape(name, points)
    check_values(name, points)


def check_shape(name: str, points: Tensor) -> None:
    if points.ndim != 2 or points.dtype != torch.float32 or not points.numel():
        raise InputError(
            f"{name} must be float32 (N, D), at least one, got {points.dtype} {tuple(points.shape)}"
        )
    if points.shape[1] > MOST_COORDINATES:
        raise InputError(
            f"{name} must have at most {MOST_COORDINATES} coordinates each, got {points.shape[1]}"
        )


def check_values(name: str, points: Tensor) -> None:
    smallest, largest = points.aminmax()  # NaN if there is one
    if not bool(torch.maximum(-smallest, largest) <= LARGEST):
        raise InputError(
            f"{name} must be finite and at most {LARGEST:.0e} in size, got "
            f"{smallest.item():.3g}..{largest.item():.3g}"
        )


def _kcenter_native(points, k, start, progress) -> Tensor:
    array = points.contiguous().numpy()
    picks = torch.empty(k, dtype=torch.int64)
    picks[0] = start
    origin, reach = native.reach_of_bytes(array, SAMPLE)
    if not math.isfinite(reach):
        check_values("points", points)
    # Values are looked at where they are first read: reading all of them once more would be a tenth
    # of the time of a selection of few.
    computed = native.greedy_kcenter(array, origin, reach, LARGEST, picks.numpy(), progress)
    if computed < 0:  # distances; here, a value that was refused
        check_values("points", points)
    progress(k)
    return picks


def _kcenter_reference(points, k, start, progress) -> Tensor:
    check_values("points", points)
    return reference.greedy_kcenter(points, k, start, progress)


OPERATIONS["greedy_kcenter"] = (
    native_backend(_kcenter_native, lambda points: not_on_cpu([points])),
    reference_backend(_kcenter_reference),
)
