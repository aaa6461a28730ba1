"""PatchCore: the distance of every patch to the nearest in a bank of normal patches.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022; table 6 of the SPD
paper compares pre-trainings with it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spd_fast.detector import (
    channels_of_layers,
    check_image_size,
    feature_network,
    read_layers,
    refuse_not_finite,
    smooth_upsample,
)
from spd_fast.errors import InputError
from spd_fast.files import read_marked, save_state
from spd_fast.models import check_can_compile, load_backbone, new_backbone, pick_device
from spd_fast.ops.kcenter import greedy_kcenter
from spd_fast.ops.nearest import nearest_neighbors, prepare_bank
from spd_fast.preprocess import Preset, find_preset
from spd_fast.reference_patchcore import mean_patches, reweighted_scores

FORMAT, VERSION = "spd-fast patchcore", 1
BANK_DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class PatchCorePreset(Preset):
    """How one reference system prepares images and smooths maps, and what its PatchCore does."""

    patch_dim: int | None  # bins that channels are pooled to; None: averaged over 3 x 3, all kept
    # Components of the random projection; None: as the Johnson-Lindenstrauss lemma asks.
    components: int | None
    sparse: bool  # the projection has few entries, all of one size
    upsampling: str  # of the map: "bilinear" or "nearest"
    n_neighbors: int  # of the nearest item, that re-weight the image score; 1: none


PRESETS = {
    "paper": PatchCorePreset(
        shorter_side=256,
        size=224,
        resampling=Image.Resampling.BILINEAR,
        border="symmetric",
        patch_dim=1024,
        components=128,
        sparse=False,
        upsampling="bilinear",
        n_neighbors=1,
    ),
    "anomalib": PatchCorePreset(
        shorter_side=None,
        size=256,
        resampling=None,
        border="reflect",
        patch_dim=None,
        components=None,
        sparse=True,
        upsampling="nearest",
        n_neighbors=9,
    ),
}


class PatchCore:
    """Anomaly detector with a bank of patches of normal images.

    Fitting keeps the patches of all images, 784 or 1,024 of each, until the coreset is chosen:
    `bank_dtype` float16 halves that, and the saved file. Scoring holds the coreset in float32.

    Args:
        backbone: a torchvision ResNet by name; features are those of its layer2 and layer3.
        preset: "paper" (patchcore-inspection) or "anomalib", see `PRESETS`.
        coreset_ratio: how much of the patches the bank keeps, above 0 and up to 1.
        n_neighbors: items of the bank around the nearest one that re-weight the image score; 1:
            the largest distance as it is; None: as the preset has it, 1 or 9.
        bank_dtype: "float32" or "float16", what patches are rounded to and stored in.
        weights: "imagenet", "random", or a file: our checkpoint or a torchvision state dict.
        seed: of the projection, of the coreset's first patch, and of random weights.
        device: where the network runs and distances are computed.
        compile: run the network through torch.compile, as for `PaDiM`.

    Raises:
        InputError: an unknown name, a number out of range, weights that cannot be had or do not fit
            the backbone, or no C++ compiler to compile with.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        preset: str = "paper",
        coreset_ratio: float = 0.1,
        n_neighbors: int | None = None,
        bank_dtype: str = "float32",
        weights: str | Path = "imagenet",
        seed: int = 0,
        device: str | torch.device = "cpu",
        compile: bool = False,
    ):
        self._configure(backbone, preset, n_neighbors, bank_dtype, device)
        if not 0 < coreset_ratio <= 1:
            raise InputError(f"coreset_ratio must be above 0 and at most 1, got {coreset_ratio}")
        self.coreset_ratio, self.seed = coreset_ratio, seed
        if compile:
            check_can_compile(self.device)
        module = load_backbone(backbone, weights, seed=seed)
        self.network, self._run = feature_network(module, self.device, compile)

    def _configure(self, backbone, preset, n_neighbors, bank_dtype, device) -> None:
        if bank_dtype not in BANK_DTYPES:
            raise InputError(f"bank_dtype is one of {', '.join(BANK_DTYPES)}; got {bank_dtype!r}")
        self.backbone, self.preset, self.bank_dtype = backbone, preset, bank_dtype
        self.settings = find_preset(preset, PRESETS)
        self.n_neighbors = self.settings.n_neighbors if n_neighbors is None else n_neighbors
        if self.n_neighbors < 1:
            raise InputError(f"n_neighbors must be at least 1, got {n_neighbors}")
        self.device = pick_device(device)
        self.bank = None  # of `prepare_bank`
        self.count = self.patch_count = 0  # images and patches fitted
        self.image_size: tuple[int, int] | None = None

    def patches(self, images: Tensor) -> Tensor:
        """Features of every patch of (B, 3, H, W) normalised images: (B, h, w, D).

        Raises:
            InputError: wrong shape or dtype, or features that are not finite.
        """
        layers = read_layers(self._run, images)[1:]  # layer2 and layer3
        refuse_not_finite(layers, self.backbone)
        with torch.inference_mode():
            if self.settings.patch_dim is None:
                found = mean_patches(layers)
            else:
                found = pooled_patches(layers, self.settings.patch_dim)
        return found.unflatten(1, layers[0].shape[2:])

    def fit(self, batches: Iterable[Tensor]) -> "PatchCore":
        """Fit to normal images.

        Args:
            batches: of (B, 3, H, W) float images, normalised as `spd_fast.preprocess` does; all of
                one size.

        Returns:
            self.

        Raises:
            InputError: no image, several image sizes, features that are not finite, or so few
                patches that the coreset would be empty.
        """
        self.bank = self.image_size = None
        self.count = self.patch_count = 0
        blocks = []  # on the CPU, each kept as it is: no second copy of all patches is ever made
        for images in batches:
            if not len(images):
                continue
            patches = self.patches(images).flatten(0, 2)
            self.image_size = self.image_size or tuple(images.shape[2:])
            check_image_size(images, self.image_size, "PatchCore")
            blocks.append(_rounded(patches, self.bank_dtype).cpu())
            self.count += len(images)
        if not blocks:
            raise InputError("PatchCore needs at least 1 image to fit, got 0")
        self.patch_count = sum(map(len, blocks))
        self.bank = prepare_bank(self._coreset(blocks).float().to(self.device))
        return self

    @torch.inference_mode()
    def _coreset(self, blocks: list[Tensor]) -> Tensor:
        size = int(self.patch_count * self.coreset_ratio)
        if size < 1:
            raise InputError(
                f"coreset_ratio {self.coreset_ratio} of {self.patch_count} patches is less than 1"
            )
        if size == self.patch_count:
            return torch.cat(blocks)
        generator = torch.Generator().manual_seed(self.seed)
        start = int(torch.randint(self.patch_count, (1,), generator=generator))
        dim = blocks[0].shape[1]
        components = self.settings.components or johnson_lindenstrauss(self.patch_count)
        if components < dim:
            projection = random_projection(dim, components, self.settings.sparse, generator)
            projected = torch.empty(self.patch_count, components)
            for block, rows in zip(blocks, projected.split([len(block) for block in blocks])):
                torch.matmul(block.float(), projection, out=rows)
        else:
            projected = torch.cat(blocks).float()
        picks = greedy_kcenter(projected, size, start, progress=True)
        return _rows(blocks, picks)

    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly maps and image scores.

        Args:
            images: (B, 3, H, W) float, normalised; H and W as in `fit`.

        Returns:
            maps (B, H, W): distances, upsampled and smoothed with a Gaussian of sigma 4 pixels;
            scores (B,): the largest distance of each image's patches, re-weighted if n_neighbors
            is above 1. Both float32, neither scaled by other images.

        Raises:
            InputError: not fitted, another image size than fitted, features that are not finite.
        """
        if self.bank is None:
            raise InputError("this PatchCore is not fitted: call fit() or load() first")
        patches = self.patches(images)
        check_image_size(images, self.image_size, "PatchCore")
        distances, indices = (
            found.view(patches.shape[:3])
            for found in nearest_neighbors(patches.flatten(0, 2), self.bank)
        )
        maps = smooth_upsample(
            distances,
            self.image_size,
            border=self.settings.border,
            upsampling=self.settings.upsampling,
        )
        return maps, self._image_scores(patches, distances, indices)

    def _image_scores(self, patches: Tensor, distances: Tensor, indices: Tensor) -> Tensor:
        scores, farthest = distances.flatten(1).max(1)
        if self.n_neighbors == 1 or not len(patches):
            return scores
        images = torch.arange(len(patches), device=patches.device)
        patch = patches.flatten(1, 2)[images, farthest]
        points = self.bank.points[:, : patch.shape[1]]
        nearest = points[indices.flatten(1)[images, farthest]]
        neighbors = min(self.n_neighbors, len(points))
        _, around = nearest_neighbors(nearest, self.bank, neighbors)
        return reweighted_scores(scores, patch, points[around])

    def save(self, path: str | Path) -> None:
        """Write everything that scoring needs, the network's weights included, to one file."""
        if self.bank is None:
            raise InputError("this PatchCore is not fitted: there is nothing to save")
        dim = len(self.bank.origin)
        state = {
            "format": FORMAT,
            "version": VERSION,
            "backbone": self.backbone,
            "preset": self.preset,
            "n_neighbors": self.n_neighbors,
            "bank_dtype": self.bank_dtype,
            "coreset_ratio": self.coreset_ratio,
            "seed": self.seed,
            "count": self.count,
            "patch_count": self.patch_count,
            "image_size": list(self.image_size),
            "bank": _rounded(self.bank.points[:, :dim], self.bank_dtype).cpu().contiguous(),
            "network": {k: v.cpu() for k, v in self.network.state_dict().items()},
        }
        save_state(path, state)

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", compile: bool = False
    ) -> "PatchCore":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or is not a saved PatchCore, or there is no C++ compiler
                to compile with.
        """
        if compile:
            check_can_compile(pick_device(device))
        state = read_marked(path, "a saved PatchCore", FORMAT, VERSION)
        model = cls.__new__(cls)
        try:
            model._configure(
                *(state[name] for name in ("backbone", "preset", "n_neighbors", "bank_dtype")),
                device,
            )
            backbone = new_backbone(state["backbone"])
            model.network, model._run = feature_network(backbone, model.device, compile)
            model.network.load_state_dict(state["network"])
            for name in ("coreset_ratio", "seed", "count", "patch_count"):
                setattr(model, name, state[name])
            model.image_size = tuple(state["image_size"])
            wanted = model.settings.patch_dim or sum(channels_of_layers(model.network)[1:])
            if state["bank"].ndim != 2 or state["bank"].shape[1] != wanted:
                shape = tuple(state["bank"].shape)
                raise InputError(f"patches have {wanted} features, its bank is {shape}")
            model.bank = prepare_bank(state["bank"].float().to(model.device))
        # A part is missing or cannot be so.
        except (KeyError, RuntimeError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{path} is a damaged PatchCore: {error}") from error
        return model


def pooled_patches(layers: list[Tensor], dim: int) -> Tensor:
    """`reference_patchcore.pooled_patches` in one grouped convolution per layer.

    Neighbourhood and both poolings are linear and come before the resizing, which acts on each
    channel alone. In a torchvision ResNet the bins of the second pooling fall into equal groups
    that begin and end with a channel.
    """
    grid, found = layers[0].shape[2:], []
    for layer in layers:
        channels, bins = layer.shape[1], dim // len(layers)
        groups = math.gcd(channels, bins)
        taps = torch.eye(9 * channels // groups, device=layer.device)
        pooled = F.adaptive_avg_pool1d(F.adaptive_avg_pool1d(taps, dim // groups), bins // groups)
        weight = pooled.T.reshape(bins // groups, channels // groups, 3, 3).repeat(groups, 1, 1, 1)
        averaged = F.conv2d(layer, weight, padding=1, groups=groups)
        found.append(F.interpolate(averaged, size=grid, mode="bilinear"))
    return torch.cat(found, 1).flatten(2).mT


def johnson_lindenstrauss(count: int, eps: float = 0.9) -> int:
    """Dimensions that keep all distances of `count` points within 1 +- eps, as anomalib asks:
    4 ln(count) / (eps^2 / 2 - eps^3 / 3), here rounded up to a multiple of 32,
    to which k-center pads its bytes anyway."""
    needed = 4 * math.log(max(count, 2)) / (eps**2 / 2 - eps**3 / 3)
    return 32 * math.ceil(int(needed) / 32)


def random_projection(
    dim: int, components: int, sparse: bool, generator: torch.Generator
) -> Tensor:
    """(dim, components) random matrix that keeps squared lengths on average.

    Dense: uniform entries, as those of torch.nn.Linear. Sparse: entries +-s or, most of them, 0;
    one in sqrt(dim) is not (Li et al., "Very sparse random projections", KDD 2006).
    """
    uniform = torch.rand(dim, components, generator=generator)
    if not sparse:
        return (2 * uniform - 1) * math.sqrt(3 / components)
    density = 1 / math.sqrt(dim)
    signs = (uniform < density / 2).float() - (uniform > 1 - density / 2).float()
    return signs / math.sqrt(density * components)


def _rounded(patches: Tensor, dtype: str) -> Tensor:
    rounded = patches.to(getattr(torch, dtype))
    if not bool(rounded.isfinite().all()):
        raise InputError(f"a feature of {patches.abs().max().item():.3g} does not fit {dtype}")
    return rounded


def _rows(blocks: list[Tensor], rows: Tensor) -> Tensor:
    """Rows of the concatenation of blocks, which is not made."""
    found = blocks[0].new_empty(len(rows), blocks[0].shape[1])
    begin = 0
    for block in blocks:
        inside = (rows >= begin) & (rows < begin + len(block))
        found[inside] = block[rows[inside] - begin]
        begin += len(block)
    return found
