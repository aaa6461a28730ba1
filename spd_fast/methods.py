"""The ways of pre-training: what each puts on the backbone, and its loss on the views of a batch.

The views of a batch are (V, N, 3, S, S): a method's own, one or two strong ones, then, with SPD,
x_pos and x_neg. Each view is a pass of its own, SimCLR's two excepted: batch norm sees one kind of
view at a time.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast.losses import moco_loss, nt_xent, simsiam_loss
from spd_fast.models import new_backbone


class Method(nn.Module, ABC):
    """A backbone and the heads of a method.

    `loss` gives the method's loss and the projections z of its first view, which SPD compares with
    those of x_pos and x_neg.
    """

    strong_views = 2

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

    def features(self, views: Tensor) -> Tensor:
        """(N, 3, S, S) -> the backbone's features (N, width)."""
        return self.backbone(views)

    def project(self, views: Tensor) -> Tensor:
        """(N, 3, S, S) -> projections z (N, dim)."""
        return self.projector(self.features(views))

    def tell_apart(self, views: Tensor) -> Tensor:
        """(N, 3, S, S) -> logits (N, 2) of being an SPD positive, an SPD negative."""
        return self.spd_classifier(self.features(views))

    @abstractmethod
    def loss(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of views (V, N, 3, S, S) of N images of classes `labels`, and z (N, dim)."""

    def start_from(self, backbone: nn.Module) -> None:
        """Take over the weights of a torchvision ResNet, its classifier fc aside."""
        state = {k: v for k, v in backbone.state_dict().items() if not k.startswith("fc.")}
        self.backbone.load_state_dict(state)

    def fixed_rate_parameters(self) -> list[nn.Parameter]:
        """Parameters whose learning rate is no part of the schedule."""
        return []


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

    def loss(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`losses.simsiam_loss` of two views."""
        z, z_hat = self.project(views[0]), self.project(views[1])
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
    there are two at least. The running statistics move as far as with one group.

    Args:
        backbone: name of a torchvision ResNet.
        dim: width of the projections.
        queue_size: K, keys of earlier batches that are negatives; at least one batch.
        key_momentum: m, with which the copy follows: key = m * key + (1 - m) * query.
        temperature: tau of `losses.moco_loss`.
        bn_group: images that are normalised together; at most an eighth of the batch is best.
    """

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
        groups = self._groups(len(views))
        return _in_groups(self.backbone, views.tensor_split(groups))

    def loss(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`losses.moco_loss` of queries of the first view and keys of the second, which then take
        the place of the oldest in the queue."""
        z = self.project(views[0])
        keys = self._keys(views[1])
        loss = moco_loss(z, keys, self.queue.clone(), self.temperature)
        with torch.no_grad():
            rows = (self.next_row + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue[rows] = keys
            self.next_row.copy_((self.next_row + len(keys)) % len(self.queue))
        return loss, z

    def start_from(self, backbone: nn.Module) -> None:
        """The copy starts from the same."""
        super().start_from(backbone)
        self.key_backbone.load_state_dict(self.backbone.state_dict())

    @torch.no_grad()
    def _keys(self, views: Tensor) -> Tensor:
        """Normalised keys (N, dim), after the copy has moved one step."""
        for key, query in (
            (self.key_backbone, self.backbone),
            (self.key_projector, self.projector),
        ):
            for k, q in zip(key.parameters(), query.parameters()):
                k.lerp_(q, 1 - self.key_momentum)
        groups = self._groups(len(views))
        features = _in_groups(self.key_backbone, [views[g::groups] for g in range(groups)])
        order = torch.cat([torch.arange(len(views))[g::groups] for g in range(groups)])
        return F.normalize(self.key_projector(features[order.argsort()]), dim=1)

    def _groups(self, images: int) -> int:
        return max(2, images // self.bn_group)


class SimCLR(Method):
    """Chen et al. 2020a, as its authors' code has it: a projector of three layers, whose last batch
    norm only scales, residual branches that start at zero, and both views in one pass.

    Args:
        backbone: name of a torchvision ResNet.
        dim: width of the projections.
        temperature: tau of `losses.nt_xent`.
    """

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

    def loss(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`losses.nt_xent` of two views."""
        z, z_hat = self.project(torch.cat([views[0], views[1]])).chunk(2)
        return nt_xent(z, z_hat, self.temperature), z


class Supervised(Method):
    """Classification with cross-entropy. For SPD, z are the backbone's features.

    Args:
        backbone: name of a torchvision ResNet.
        classes: how many there are.
    """

    strong_views = 1

    def __init__(self, backbone: str = "resnet50", classes: int = 1000):
        super().__init__(backbone)
        self.classifier = nn.Linear(self.width, classes)

    def loss(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy of the first view's classes."""
        z = self.project(views[0])
        return F.cross_entropy(self.classifier(z), labels), z


def _in_groups(backbone: nn.Module, groups: Sequence[Tensor]) -> Tensor:
    """Features of all; batch norm's running statistics move by torch's 0.1 for all together."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1 - 0.9 ** (1 / len(groups))
    return torch.cat([backbone(group) for group in groups])


def _hidden(n_in: int, n_out: int) -> list[nn.Module]:
    return [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU(inplace=True)]
