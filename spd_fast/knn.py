"""How well nearest neighbours tell classes apart, while a backbone trains without them."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from spd_fast.datasets.folder import ImageFolder
from spd_fast.datasets.images import read_image
from spd_fast.errors import InputError
from spd_fast.preprocess import Preset, prepare_image

BANK, QUERIES = 20_000, 5_000  # images at most, spread over the data
BATCH = 64


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
        size: side that images are cut to, after their shorter side became 8 / 7 of it.
        device: of the backbone.
        workers: threads that read images.

    Raises:
        InputError: a class of `held_out` is none of `train`.
    """

    def __init__(
        self,
        train: ImageFolder,
        held_out: Iterable[str],
        size: int,
        device: torch.device,
        workers: int,
    ):
        others = ImageFolder(held_out)
        unknown = sorted(set(others.classes) - set(train.classes))
        if unknown:
            raise InputError(f"knn: the class {unknown[0]} is not one of the training data's")
        number = {name: k for k, name in enumerate(train.classes)}
        self.bank = _spread(train, BANK)
        paths, names = _spread(others, QUERIES)
        self.queries = paths, [number[others.classes[label]] for label in names]
        self.preset = Preset(size * 8 // 7, size, Image.Resampling.BILINEAR, border="")
        self.device, self.workers = device, workers

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

    @torch.no_grad()
    def _features(self, backbone: nn.Module, paths: list) -> Tensor:
        found = []
        with ThreadPoolExecutor(self.workers) as pool:
            for i in range(0, len(paths), BATCH):
                images = list(pool.map(self._prepared, paths[i : i + BATCH]))
                batch = torch.stack(images).to(self.device, memory_format=torch.channels_last)
                found.append(backbone(batch))
        return torch.cat(found)

    def _prepared(self, path) -> Tensor:
        return prepare_image(read_image(path), self.preset)


def _spread(data: ImageFolder, most: int) -> tuple[list, list[int]]:
    """Paths and labels of at most so many images, at equal distances."""
    places = np.linspace(0, len(data) - 1, min(most, len(data))).round().astype(int)
    return [data.paths[i] for i in places], [data.labels[i] for i in places]
