"""How well nearest neighbours tell classes apart, while a backbone trains without them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast.datasets.shards import Images, open_images
from spd_fast.held_out import labels_among, outputs

BANK, QUERIES = 20_000, 5_000  # images at most, spread over the data


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Share of queries whose class the weighted vote of their neighbours gives (Wu et al. 2018,
    section 3.4): each of the k nearest by cosine votes for its class with exp(cosine / tau).

    Args:
        bank: (N, D) features, and `bank_labels` (N,) int64 their classes, from 0.
        queries: (M, D), and `labels` (M,).
        k: neighbours, all if there are fewer.
        temperature: tau.
    """
    bank = F.normalize(bank, dim=1)
    right = 0
    for some, wanted in zip(queries.split(1024), labels.split(1024), strict=True):
        cosines, places = (F.normalize(some, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = cosines.new_zeros(len(some), int(bank_labels.max()) + 1)
        votes.scatter_add_(1, bank_labels[places], (cosines / temperature).exp())
        right += int((votes.argmax(1) == wanted).sum())
    return right / len(queries)


class KnnMonitor:
    """`knn_accuracy` of a backbone: neighbours from the training data, queries from other images.

    Args:
        train: the training data.
        held_out: directories of other images, of the same classes.
        size: side that images are cut to, see `held_out.outputs`.
        device: of the backbone.
        workers: threads that read images.

    Raises:
        InputError: a class of `held_out` is none of `train`.
    """

    def __init__(
        self,
        train: Images,
        held_out: Iterable[str],
        size: int,
        device: torch.device,
        workers: int,
    ):
        others = open_images(held_out)
        self.bank = _spread(train.paths, train.labels, BANK)
        self.queries = _spread(others.paths, labels_among(train.classes, others, "knn"), QUERIES)
        self.size, self.device, self.workers = size, device, workers

    def accuracy(self, backbone: nn.Module) -> float:
        """Of a backbone that gives features (N, D); batch norm uses its running statistics."""
        training = backbone.training
        backbone.eval()
        try:
            (bank, bank_labels), (queries, labels) = (
                (self._features(backbone, paths), torch.tensor(labels, device=self.device))
                for paths, labels in (self.bank, self.queries)
            )
        finally:
            backbone.train(training)
        return knn_accuracy(bank, bank_labels, queries, labels)

    def _features(self, backbone: nn.Module, paths: list[Path]) -> Tensor:
        return torch.cat([*outputs(backbone, paths, self.size, self.device, self.workers)])


def _spread(
    paths: Sequence[Path], labels: Sequence[int], most: int
) -> tuple[list[Path], list[int]]:
    """At most so many of the images and their labels, at equal distances."""
    places = np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)
    return [paths[i] for i in places], [labels[i] for i in places]
