"""What is right, of PatchCore: every step in plain torch. See `spd_fast.reference`.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), CVPR 2022.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------------------------------------------------- distances

PARTIAL_SUMS = 32


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2 of (..., D) points that broadcast, in a defined order of operations.

    Which point is the farthest must not hang on who rounds how. So: square the differences; add
    the D squares in blocks of 32, place by place, to 32 partial sums; add the upper half of the
    partial sums to the lower until one is left. Every square and every sum is rounded.
    """
    squares = (x - y).square()
    squares = F.pad(squares, (0, -squares.shape[-1] % PARTIAL_SUMS))
    sums = torch.zeros_like(squares[..., :PARTIAL_SUMS])
    for block in squares.split(PARTIAL_SUMS, -1):
        sums = sums + block
    while sums.shape[-1] > 1:
        lower, upper = sums.chunk(2, -1)
        sums = lower + upper
    return sums[..., 0]


def nearest_neighbors(queries: Tensor, bank: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k points of the bank with the smallest |q - b|^2, of equals the lowest index first.

    Args:
        queries: (Q, D). bank: (N, D). k: 1..N.

    Returns:
        squared distances (Q, k), ascending; indices (Q, k) int64.
    """
    squared = queries.new_empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    at_once = max(1, (1 << 25) // bank.numel())  # bounds the memory
    for i in range(0, len(queries), at_once):
        distances = squared_distances(queries[i : i + at_once, None], bank)
        distances, order = distances.sort(dim=1, stable=True)
        squared[i : i + at_once], indices[i : i + at_once] = distances[:, :k], order[:, :k]
    return squared, indices


# ----------------------------------------------------------------------------------------- coreset


def greedy_kcenter(
    points: Tensor, k: int, start: int, progress: Callable[[int], object] = lambda done: None
) -> Tensor:
    """Greedy k-center: pick the point whose nearest pick is farthest, until there are k.

    pick_1 = start, pick_{j+1} = argmax_i min_{c <= j} |x_i - x_{pick_c}|^2 over the points not
    picked yet, of equals the lowest index (Gonzalez 1985; algorithm 1 of the PatchCore paper). That
    no point is picked twice matters only once all that are left are copies of picks.

    Args:
        points: (N, D). k: 1..N. start: index of the first pick.
        progress: called with the number of picks after each.

    Returns:
        (k,) int64 in the order of the picks.
    """
    picks = torch.full((k,), start, dtype=torch.int64, device=points.device)
    nearest = points.new_full((len(points),), torch.inf)
    for j in range(1, k):
        nearest = torch.minimum(nearest, squared_distances(points, points[picks[j - 1]]))
        nearest[picks[:j]] = -1
        picks[j] = nearest.argmax()  # of equals the first
        progress(j + 1)
    return picks


# --------------------------------------------------------------------------------------- embedding


def mean_patches(layers: Sequence[Tensor]) -> Tensor:
    """Patch features as anomalib makes them: each layer averaged over 3 x 3 places (zeros outside,
    always divided by 9), brought to the first one's grid bilinearly, channels concatenated.

    Args:
        layers: (B, C_l, h_l, w_l), the finest first.

    Returns:
        (B, h * w, sum C_l).
    """
    grid = layers[0].shape[2:]
    averaged = [F.avg_pool2d(layer, 3, stride=1, padding=1) for layer in layers]
    resized = [F.interpolate(a, size=grid, mode="bilinear") for a in averaged]
    return torch.cat(resized, 1).flatten(2).mT


def pooled_patches(layers: Sequence[Tensor], dim: int) -> Tensor:
    """Patch features as patchcore-inspection makes them.

    The 3 x 3 neighbourhoods of each layer (zeros outside), C_l * 9 numbers with the place running
    fastest, are brought to the first layer's grid bilinearly and averaged in `dim` bins (adaptive
    pooling); the bins of all layers, one layer after the other, are averaged in `dim` bins again.

    Args:
        layers: (B, C_l, h_l, w_l), the finest first.

    Returns:
        (B, h * w, dim).
    """
    grid = layers[0].shape[2:]
    pooled = []
    for layer in layers:
        neighbourhoods = F.unfold(layer, 3, padding=1).unflatten(2, layer.shape[2:])
        resized = F.interpolate(neighbourhoods, size=grid, mode="bilinear")
        pooled.append(F.adaptive_avg_pool1d(resized.flatten(2).mT, dim))
    return F.adaptive_avg_pool1d(torch.cat(pooled, 2), dim)


# ------------------------------------------------------------------------------------------- score


def reweighted_scores(scores: Tensor, patch: Tensor, around: Tensor) -> Tensor:
    """Image scores of formula 7 of the PatchCore paper: s (1 - exp|m - m*| / sum_n exp|m - n|).

    Args:
        scores: s (B,), the largest distance of an image's patches to their nearest items.
        patch: m (B, D), the patch that has it.
        around: n (B, b, D), the b items nearest to m*, the item nearest to m; m* is the first.

    Returns:
        (B,).
    """
    to_around = squared_distances(patch[:, None], around).sqrt()
    return scores * (1 - to_around.softmax(1)[:, 0])
