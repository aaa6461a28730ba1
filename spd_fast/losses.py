"""The losses of the paper (formulas 1 and 2), SimSiam, MoCo and SimCLR, of (N, D) vectors.

Under autocast, too, they are computed in float32: half precision would round the cosines, whose
differences are what is learnt from.
"""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor


def _in_float32(loss: Callable) -> Callable:
    @wraps(loss)
    def computed(*vectors: Tensor, **kwargs) -> Tensor:
        def widen(value):
            half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
            return value.float() if half else value

        tensors = [v for v in (*vectors, *kwargs.values()) if isinstance(v, Tensor)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return loss(*map(widen, vectors), **{k: widen(v) for k, v in kwargs.items()})

    return computed


@_in_float32
def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(N,) cosine similarity of the rows of two (N, D) batches."""
    return F.cosine_similarity(a, b, dim=1)


@_in_float32
def simsiam_loss(p: Tensor, p_hat: Tensor, z: Tensor, z_hat: Tensor) -> Tensor:
    """-(cos(p, z_hat) + cos(p_hat, z)) / 2, the mean over the batch.

    No gradient flows into the projections z (Chen & He 2021, algorithm 1); p are the predictions.
    """
    return -(cosine(p, z_hat.detach()).mean() + cosine(p_hat, z.detach()).mean()) / 2


@_in_float32
def info_nce(z: Tensor, z_hat: Tensor, temperature: float) -> Tensor:
    """Formula 1: -log of the softmax share of the positive pair, the mean over the batch.

    The negatives of anchor i are the other anchors z_j of the batch; all vectors are L2-normalised.
    """
    z, z_hat = F.normalize(z, dim=1), F.normalize(z_hat, dim=1)
    positive = (z * z_hat).sum(1, keepdim=True)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    negative = (z @ z.T).masked_fill(own, -torch.inf)
    logits = torch.cat([positive, negative], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long, device=z.device))


@_in_float32
def moco_loss(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """-log of the softmax share of each query's own key among it and the (K, D) queue, the mean
    over the batch (He et al. 2020, formula 1).

    Queries and keys are L2-normalised here, the queue holds keys that were.
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    positive = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([positive, queries @ queue.T], 1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


@_in_float32
def nt_xent(z: Tensor, z_hat: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, formula 1): each of the 2 N vectors against all others, of which
    the other view of its image is the positive one; the mean over all.
    """
    both = F.normalize(torch.cat([z, z_hat]), dim=1)
    own = torch.eye(len(both), dtype=torch.bool, device=z.device)
    logits = (both @ both.T / temperature).masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(both), device=z.device).roll(len(z)))


@_in_float32
def spd_loss(z: Tensor, z_neg: Tensor, z_pos: Tensor) -> Tensor:
    """Formula 2: cos(z, z_neg) - cos(z, z_pos), the mean over the batch, in [-2, 2].

    The gradient flows through all three projections.
    """
    return (cosine(z, z_neg) - cosine(z, z_pos)).mean()


@_in_float32
def spd_cross_entropy(logits_neg: Tensor, logits_pos: Tensor) -> Tensor:
    """The cross-entropy form of SPD ("Xent" of the ablation): class 0 is x_pos, class 1 is x_neg.

    Both are (N, 2) logits of a linear classifier on the backbone's features (paper 3.3); the mean
    over the 2 N views, log 2 for a classifier that knows nothing.
    """
    logits = torch.cat([logits_pos, logits_neg])
    labels = torch.arange(2, device=logits.device).repeat_interleave(len(logits_pos))
    return F.cross_entropy(logits, labels)
