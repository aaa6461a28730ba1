"""The ways of pre-training: what each puts on the backbone, and its loss on the views of a batch.

The views of a batch are (V, N, 3, S, S): a method's own, one or two strong ones, then, with SPD,
x_pos and x_neg. Each view is a pass of its own through the backbone, SimCLR's two excepted: batch
norm sees one kind of view at a time. With `shared_forward` all views are one pass.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast.distributed import gather, mean_over_ranks, rank, world_size
from spd_fast.losses import (
    cosine,
    moco_loss,
    nt_xent,
    simsiam_loss,
    spd_cross_entropy,
    spd_loss,
)
from spd_fast.models import new_backbone


class Method(nn.Module, ABC):
    """A backbone and the heads of a method.

    Attributes:
        strong_views: how many views are the method's own.
        encoded_views: how many of them, the first, pass through the backbone.
        one_pass: how many of these are one pass.
        shared_forward: all views are one pass, and batch norm normalises each with the statistics
            of all kinds together. Faster where a pass alone does not fill the device; other losses.
    """

    strong_views = encoded_views = 2
    one_pass = 1
    shared_forward = False

    def __init__(self, backbone: str, zero_init_residual: bool = False):
        super().__init__()
        self.backbone = new_backbone(backbone, zero_init_residual=zero_init_residual)
        self.width = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.projector = nn.Identity()
        self.spd_classifier = None

    def add_spd_classifier(self) -> None:
        """What SPD with cross-entropy needs; made last, so that it changes no other weight."""
        self.spd_classifier = nn.Linear(self.width, 2)

    def forward(self, views: Tensor, labels: Tensor, eta: float) -> dict[str, Tensor]:
        """Formula 3 and its parts.

        Args:
            views: (V, N, 3, S, S): the method's own and, with SPD, x_pos, x_neg.
            labels: (N,) int64, classes; only `Supervised` reads them.
            eta: weight of the SPD loss.

        Returns:
            Scalars: "loss" (formula 3), "loss_ssl", with SPD "loss_spd"; and, without gradients,
            what `collapse_indicators` tells of the projections.
        """
        features = self.encode(views)
        ssl, z = self.loss(features, views, labels)
        losses = {"loss": ssl, "loss_ssl": ssl}
        of_spd = []
        if len(views) == self.strong_views + 2:
            of_spd = [self.projector(f) for f in features[-2:]]
            losses["loss_spd"] = self._spd_loss(z, *of_spd, *features[-2:])
            losses["loss"] = ssl + eta * losses["loss_spd"]
        return losses | collapse_indicators(z, *of_spd)

    def encode(self, views: Tensor) -> list[Tensor]:
        """The backbone's features (N, width) of the encoded views, then of x_pos and x_neg."""
        encoded = [*views[: self.encoded_views], *views[self.strong_views :]]
        together = len(encoded) if self.shared_forward else self.one_pass
        if together == 1:
            return [self.features(view) for view in encoded]
        shared = self.features(torch.cat(encoded[:together])).chunk(together)
        return [*shared, *(self.features(view) for view in encoded[together:])]

    def features(self, views: Tensor) -> Tensor:
        """(N, 3, S, S) -> the backbone's features (N, width)."""
        return self.backbone(views)

    @abstractmethod
    def loss(
        self, features: Sequence[Tensor], views: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The method's loss, and the projections z (N, dim) of the first view, which SPD compares
        with those of x_pos and x_neg.

        Args:
            features: what `encode` made of the views.
            views: (V, N, 3, S, S).
            labels: (N,) int64.
        """

    def before_step(self) -> None:
        """What has to be done once before each step, however many parts its batch comes in."""

    def start_from(self, backbone: nn.Module) -> None:
        """Take over the weights of a torchvision ResNet, its classifier fc aside."""
        state = {k: v for k, v in backbone.state_dict().items() if not k.startswith("fc.")}
        self.backbone.load_state_dict(state)

    def fixed_rate_parameters(self) -> list[nn.Parameter]:
        """Parameters whose learning rate is no part of the schedule."""
        return []

    def _spd_loss(self, z, z_pos, z_neg, features_pos, features_neg) -> Tensor:
        if self.spd_classifier is None:
            return spd_loss(z, z_pos=z_pos, z_neg=z_neg)
        logits = [self.spd_classifier(f) for f in (features_pos, features_neg)]
        return spd_cross_entropy(logits_pos=logits[0], logits_neg=logits[1])


@torch.no_grad()
def collapse_indicators(z: Tensor, z_pos: Tensor = None, z_neg: Tensor = None) -> dict[str, Tensor]:
    """Scalars, of the projections (N, D) of a batch over all ranks.

    "z_std" is the standard deviation of the normalised z: of SimSiam, MoCo and SimCLR about
    1 / sqrt(D) if they spread over the sphere, 0 if they have collapsed to one point. With SPD
    "cos_pos" and "cos_neg", the mean cosines of z with z_pos and z_neg, and "spd_margin", by how
    much more alike the positives are; 1, 1 and 0 if all have collapsed.
    """
    unit = F.normalize(z.float(), dim=1).double()
    count = len(unit) * world_size()
    mean, square = mean_over_ranks(torch.stack([unit.mean(0), unit.square().mean(0)]))
    spread = ((square - mean.square()).clamp(min=0) * count / (count - 1)).sqrt().mean()
    found = {"z_std": spread.float()}
    if z_pos is not None:
        found |= {"cos_pos": cosine(z, z_pos).mean(), "cos_neg": cosine(z, z_neg).mean()}
        found["spd_margin"] = found["cos_pos"] - found["cos_neg"]
    return found


class SimSiam(Method):
    """Chen & He 2021, section 3 and appendix A.

    Args:
        backbone: name of a torchvision ResNet.
        dim: width of the projections.
        predictor_dim: width of the predictor's bottleneck.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        dim: int = 2048,
        predictor_dim: int = 512,
    ):
        super().__init__(backbone, zero_init_residual=True)
        self.projector = nn.Sequential(
            *_hidden(self.width, self.width),
            *_hidden(self.width, self.width),
            nn.Linear(self.width, dim, bias=False),
            nn.BatchNorm1d(dim, affine=False),
        )
        self.predictor = nn.Sequential(*_hidden(dim, predictor_dim), nn.Linear(predictor_dim, dim))

    def loss(self, features, views, labels) -> tuple[Tensor, Tensor]:
        """`losses.simsiam_loss` of two views."""
        z, z_hat = (self.projector(f) for f in features[:2])
        return simsiam_loss(self.predictor(z), self.predictor(z_hat), z, z_hat), z

    def fixed_rate_parameters(self) -> list[nn.Parameter]:
        """The predictor's (the official recipe's --fix-pred-lr)."""
        return list(self.predictor.parameters())


class MoCo(Method):
    """MoCo v2 (He et al. 2020; Chen et al. 2020b): keys of a slowly moving copy of the encoder.

    Where the official code shuffles images between GPUs, here batch norm sees groups of images:
    of G groups, queries come in groups of neighbours, keys in groups of every G-th image, so that a
    query and its key share a G-th of the images that they are normalised with. (If they shared all,
    the statistics would tell which key is the query's.) A group has about `bn_group` images, but
    there are two at least, and as many for every rank: images move between ranks for their keys.
    The running statistics move as far as with one group.

    Args:
        backbone: name of a torchvision ResNet.
        dim: width of the projections.
        queue_size: K, keys of earlier batches that are negatives; at least one batch.
        key_momentum: m, with which the copy follows: key = m * key + (1 - m) * query.
        temperature: tau of `losses.moco_loss`.
        bn_group: images that are normalised together; at most an eighth of the batch is best.
    """

    encoded_views = 1

    def __init__(
        self,
        backbone: str = "resnet50",
        dim: int = 128,
        queue_size: int = 65536,
        key_momentum: float = 0.999,
        temperature: float = 0.2,
        bn_group: int = 32,
    ):
        super().__init__(backbone)
        self.projector = nn.Sequential(
            nn.Linear(self.width, self.width), nn.ReLU(inplace=True), nn.Linear(self.width, dim)
        )
        self.key_backbone, self.key_projector = (
            copy.deepcopy(part).requires_grad_(False) for part in (self.backbone, self.projector)
        )
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("next_row", torch.zeros((), dtype=torch.long))  # of the queue
        self.key_momentum, self.temperature = key_momentum, temperature
        self.bn_group = bn_group

    def features(self, views: Tensor) -> Tensor:
        """(N, 3, S, S) -> features (N, width) of the query encoder, in groups of neighbours."""
        groups = self._groups(len(views)) // world_size()
        return _in_groups(self.backbone, views.tensor_split(groups))

    def loss(self, features, views, labels) -> tuple[Tensor, Tensor]:
        """`losses.moco_loss` of queries of the first view and keys of the second, which then take
        the place of the oldest in the queue."""
        z = self.projector(features[0])
        keys = self._keys(views[1])
        own = keys[rank() * len(z) :][: len(z)]
        loss = moco_loss(z, own, self.queue.clone(), self.temperature)
        with torch.no_grad():
            rows = (self.next_row + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue[rows] = keys
            self.next_row.copy_((self.next_row + len(keys)) % len(self.queue))
        return loss, z

    @torch.no_grad()
    def before_step(self) -> None:
        """The copy moves."""
        for key, query in (
            (self.key_backbone, self.backbone),
            (self.key_projector, self.projector),
        ):
            for k, q in zip(key.parameters(), query.parameters()):
                k.lerp_(q, 1 - self.key_momentum)

    def start_from(self, backbone: nn.Module) -> None:
        """The copy starts from the same."""
        super().start_from(backbone)
        self.key_backbone.load_state_dict(self.backbone.state_dict())

    @torch.no_grad()
    def _keys(self, views: Tensor) -> Tensor:
        """Normalised keys (N, dim) of the images of all ranks."""
        views = gather(views)
        groups = self._groups(len(views) // world_size())
        order = torch.cat([torch.arange(len(views))[g::groups] for g in range(groups)])
        own = torch.arange(groups).tensor_split(world_size())[rank()]
        features = _in_groups(self.key_backbone, [views[g::groups] for g in own.tolist()])
        keys = F.normalize(self.key_projector(features).float(), dim=1)
        return gather(keys)[order.argsort()]

    def _groups(self, images: int) -> int:
        return bn_groups(images, self.bn_group, world_size())


def bn_groups(images: int, bn_group: int, ranks: int) -> int:
    """How many groups MoCo makes of the batches of all ranks, of so many images each: at least two,
    and as many for every rank."""
    groups = max(2, images * ranks // bn_group)
    return -(-groups // ranks) * ranks


class SimCLR(Method):
    """Chen et al. 2020a, as its authors' code has it: a projector of three layers, whose last batch
    norm only scales, residual branches that start at zero, and both views in one pass.

    Args:
        backbone: name of a torchvision ResNet.
        dim: width of the projections.
        temperature: tau of `losses.nt_xent`.
    """

    one_pass = 2

    def __init__(self, backbone: str = "resnet50", dim: int = 128, temperature: float = 0.1):
        super().__init__(backbone, zero_init_residual=True)
        self.projector = nn.Sequential(
            *_hidden(self.width, self.width),
            *_hidden(self.width, self.width),
            nn.Linear(self.width, dim, bias=False),
            nn.BatchNorm1d(dim),
        )
        self.projector[-1].bias.requires_grad_(False)  # it stays 0
        self.temperature = temperature

    def loss(self, features, views, labels) -> tuple[Tensor, Tensor]:
        """`losses.nt_xent` of two views, of the images of all ranks."""
        z, z_hat = self.projector(torch.cat(features[:2])).chunk(2)
        return nt_xent(gather(z), gather(z_hat), self.temperature), z


class Supervised(Method):
    """Classification with cross-entropy. For SPD, z are the backbone's features.

    Args:
        backbone: name of a torchvision ResNet.
        classes: how many there are.
    """

    strong_views = encoded_views = 1

    def __init__(self, backbone: str = "resnet50", classes: int = 1000):
        super().__init__(backbone)
        self.classifier = nn.Linear(self.width, classes)

    def loss(self, features, views, labels) -> tuple[Tensor, Tensor]:
        """The cross-entropy of the first view's classes."""
        (z, *_) = features
        return F.cross_entropy(self.classifier(z).float(), labels), z


def _in_groups(backbone: nn.Module, groups: Sequence[Tensor]) -> Tensor:
    """Features of all; batch norm's running statistics move by torch's 0.1 for all together."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1 - 0.9 ** (1 / len(groups))
    return torch.cat([backbone(group) for group in groups])


def _hidden(n_in: int, n_out: int) -> list[nn.Module]:
    return [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU(inplace=True)]
