"""The ways of pre-training: what each puts on the backbone, and its loss on the views of a batch.

The views of a batch are (V, N, 3, S, S): a method's own, one or two strong ones, then, with SPD,
x_pos and x_neg. Each view is a pass of its own: batch norm sees one kind of view at a time.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast.losses import moco_loss, nt_xent, simsiam_loss
from spd_fast.models import new_backbone


class Method(nn.Module):
    """A backbone, the heads of a method, and for SPD with cross-entropy a classifier of its own.

    `loss` gives the method's loss and the projections z of its first view, which SPD compares with
    those of x_pos and x_neg.
    """

    strong_views = 2

    def __init__(self, backbone: str, spd_classifier: bool, zero_init_residual: bool = False):
        super().__init__()
        self.backbone = new_backbone(backbone, zero_init_residual=zero_init_residual)
        self.width = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.projector = nn.Identity()
        self.spd_classifier = nn.Linear(self.width, 2) if spd_classifier else None

    def project(self, views: Tensor) -> Tensor:
        """(N, 3, S, S) -> projections z (N, dim)."""
        return self.projector(self.backbone(views))

    def tell_apart(self, views: Tensor) -> Tensor:
        """(N, 3, S, S) -> logits (N, 2) of being an SPD positive, an SPD negative."""
        return self.spd_classifier(self.backbone(views))

    def loss(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of views (V, N, 3, S, S) of N images of classes `labels`, and z (N, dim)."""
        raise NotImplementedError

    def start_from(self, backbone: nn.Module) -> None:
        """Take over the weights of a torchvision ResNet, its classifier fc aside."""
        state = {k: v for k, v in backbone.state_dict().items() if not k.startswith("fc.")}
        self.backbone.load_state_dict(state)

    def with_fixed_rate(self) -> list[nn.Parameter]:
        """Parameters whose learning rate is no part of the schedule."""
        return []


class SimSiam(Method):
    """Chen & He 2021, section 3 and appendix A.

    Args:
        backbone: name of a torchvision ResNet.
        dim: width of the projections.
        predictor_dim: width of the predictor's bottleneck.
        spd_classifier: add the linear classifier that SPD with cross-entropy needs.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        dim: int = 2048,
        predictor_dim: int = 512,
        spd_classifier: bool = False,
    ):
        super().__init__(backbone, spd_classifier, zero_init_residual=True)
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

    def with_fixed_rate(self) -> list[nn.Parameter]:
        """The predictor's (the official recipe's --fix-pred-lr)."""
        return list(self.predictor.parameters())


class MoCo(Method):
    """MoCo v2 (He et al. 2020; Chen et al. 2020b): keys of a slowly moving copy of the encoder.

    Where the official code shuffles images between GPUs, so that a query and its key are normalised
    with different images, here batch norm sees groups of images: queries in groups of neighbours,
    keys in groups of images that lie as far apart. A group has `bn_group` images, fewer if the
    batch would else be one group. (The statistics of both would otherwise tell which key is the
    query's.)

    Args:
        backbone: name of a torchvision ResNet.
        dim: width of the projections.
        queue_size: K, keys of earlier batches that are negatives; at least one batch.
        key_momentum: m, with which the copy follows: key = m * key + (1 - m) * query.
        temperature: tau of `losses.moco_loss`.
        bn_group: images that are normalised together.
        spd_classifier: add the linear classifier that SPD with cross-entropy needs.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        dim: int = 128,
        queue_size: int = 65536,
        key_momentum: float = 0.999,
        temperature: float = 0.2,
        bn_group: int = 32,
        spd_classifier: bool = False,
    ):
        super().__init__(backbone, spd_classifier)
        self.projector = nn.Sequential(
            nn.Linear(self.width, self.width), nn.ReLU(inplace=True), nn.Linear(self.width, dim)
        )
        self.key_backbone, self.key_projector = (
            copy.deepcopy(part).requires_grad_(False) for part in (self.backbone, self.projector)
        )
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # row of the queue
        self.key_momentum, self.temperature = key_momentum, temperature
        self.bn_group = bn_group

    def project(self, views: Tensor) -> Tensor:
        """(N, 3, S, S) -> projections of the query encoder, in groups of neighbours."""
        groups = self._groups(len(views))
        return self.projector(torch.cat([self.backbone(g) for g in views.tensor_split(groups)]))

    def loss(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`losses.moco_loss` of queries of the first view and keys of the second, which then take
        the place of the oldest in the queue."""
        z = self.project(views[0])
        keys = self._keys(views[1])
        loss = moco_loss(z, keys, self.queue.clone(), self.temperature)
        with torch.no_grad():
            rows = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue[rows] = keys
            self.oldest.copy_((self.oldest + len(keys)) % len(self.queue))
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
        first = self.key_backbone(views[::groups])
        features = first.new_empty(len(views), first.shape[1])
        features[::groups] = first
        for g in range(1, groups):
            features[g::groups] = self.key_backbone(views[g::groups])
        return F.normalize(self.key_projector(features), dim=1)

    def _groups(self, images: int) -> int:
        return max(2, images // self.bn_group)


class SimCLR(Method):
    """Chen et al. 2020a, with the three-layer projector of its authors' code (SimCLR v2).

    Args:
        backbone: name of a torchvision ResNet.
        dim: width of the projections.
        temperature: tau of `losses.nt_xent`.
        spd_classifier: add the linear classifier that SPD with cross-entropy needs.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        dim: int = 128,
        temperature: float = 0.1,
        spd_classifier: bool = False,
    ):
        super().__init__(backbone, spd_classifier)
        self.projector = nn.Sequential(
            *_hidden(self.width, self.width),
            *_hidden(self.width, self.width),
            nn.Linear(self.width, dim, bias=False),
            nn.BatchNorm1d(dim),
        )
        self.temperature = temperature

    def loss(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`losses.nt_xent` of two views."""
        z, z_hat = self.project(views[0]), self.project(views[1])
        return nt_xent(z, z_hat, self.temperature), z


class Supervised(Method):
    """Classification with cross-entropy. For SPD, z are the backbone's features.

    Args:
        backbone: name of a torchvision ResNet.
        classes: how many there are.
        spd_classifier: add the linear classifier that SPD with cross-entropy needs.
    """

    strong_views = 1

    def __init__(
        self, backbone: str = "resnet50", classes: int = 1000, spd_classifier: bool = False
    ):
        super().__init__(backbone, spd_classifier)
        self.classifier = nn.Linear(self.width, classes)

    def loss(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy of the first view's classes."""
        z = self.project(views[0])
        return F.cross_entropy(self.classifier(z), labels), z


def _hidden(n_in: int, n_out: int) -> list[nn.Module]:
    return [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU(inplace=True)]
