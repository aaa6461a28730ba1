"""PaDiM: one Gaussian per position of the feature grid, fitted to normal images.

Defard et al., "PaDiM", ICPR workshops 2021; the paper's 1-class method (section 5).
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from spd_fast.detector import check_image_size, feature_network, read_layers, read_marked
from spd_fast.errors import InputError
from spd_fast.files import save_state
from spd_fast.models import load_backbone, new_backbone, pick_device
from spd_fast.ops.mahalanobis import (
    FACTOR_DTYPES,
    gaussian_factor,
    gaussian_update,
    mahalanobis_map,
)
from spd_fast.preprocess import find_preset
from spd_fast.reference import packed_size, smooth_upsample_matrix

FORMAT, VERSION = "spd-fast padim", 1
# Kept channels: of the PaDiM paper, and for ResNet-50 by analogy with WideResNet-50.
N_FEATURES = {"resnet18": 100, "resnet50": 550, "wide_resnet50_2": 550}


class PaDiM:
    """Anomaly detector with a Gaussian per position.

    Fitting streams over the images: memory does not grow with their number. The covariances are
    kept as packed whitening factors, half (float32) or a quarter (float16) of the bytes of their
    inverses.

    Args:
        backbone: a torchvision ResNet by name; features are those of its layer1 to layer3.
        n_features: channels kept at random of all that the layers have; None: as in the PaDiM
            paper, 100 for resnet18 and 550 for resnet50 and wide_resnet50_2.
        preset: "paper" or "anomalib", see `spd_fast.preprocess.PRESETS`.
        factor_dtype: "float32", "float16" or "bfloat16" (the last not on the CPU's fast backend).
        weights: "imagenet", "random", or a file: our checkpoint or a torchvision state dict.
        seed: of the choice of channels, and of random weights.
        device: where the network and the Gaussians live.

    Raises:
        InputError: an unknown name, or weights that cannot be had or do not fit the backbone.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        n_features: int | None = None,
        preset: str = "paper",
        factor_dtype: str = "float32",
        weights: str | Path = "imagenet",
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        self._configure(backbone, preset, factor_dtype, device)
        self.network = feature_network(load_backbone(backbone, weights, seed=seed), self.device)
        total = self._count_channels()
        wanted = N_FEATURES.get(backbone) if n_features is None else n_features
        if wanted is None:
            raise InputError(f"n_features has no default for {backbone}: give it (at most {total})")
        if not 1 <= wanted <= total:
            raise InputError(f"n_features must be 1..{total} for {backbone}, got {wanted}")
        # Sorted, so that neighbours in the list are neighbours in the feature maps.
        generator = torch.Generator().manual_seed(seed)
        self.channels = torch.randperm(total, generator=generator)[:wanted].sort().values
        self.channels = self.channels.to(self.device)

    def _configure(self, backbone: str, preset: str, factor_dtype: str, device) -> None:
        if factor_dtype not in [str(d).removeprefix("torch.") for d in FACTOR_DTYPES]:
            raise InputError(f"factor_dtype is float32, float16 or bfloat16, got {factor_dtype!r}")
        self.backbone, self.preset, self.factor_dtype = backbone, preset, factor_dtype
        self.settings = find_preset(preset)
        self.device = pick_device(device)
        self.channels = self.mean = self.factor = None
        self.count = 0  # images fitted
        self.image_size: tuple[int, int] | None = None

    @torch.inference_mode()
    def _count_channels(self) -> int:
        probe = torch.zeros(1, 3, 64, 64, device=self.device)
        return sum(layer.shape[1] for layer in self.network(probe))

    def features(self, images: Tensor) -> list[Tensor]:
        """layer1 to layer3 of (B, 3, H, W) normalised images: (B, C_l, H / 2^(l+1), ...).

        Raises:
            InputError: wrong shape or dtype, or the network's output is not finite.
        """
        return read_layers(self.network, images, self.backbone)

    def fit(self, batches: Iterable[Tensor]) -> "PaDiM":
        """Fit to normal images.

        Args:
            batches: of (B, 3, H, W) float images, normalised as `spd_fast.preprocess` does; all of
                one size.

        Returns:
            self.

        Raises:
            InputError: fewer than two images, several image sizes, features that are not finite.
        """
        self.mean = self.factor = self.image_size = None
        self.count = 0
        scatter = None
        for images in batches:
            layers = self.features(images)
            if scatter is None:
                height, width = layers[0].shape[2:]
                positions, d = height * width, len(self.channels)
                mean = torch.zeros(positions, d, device=self.device)
                scatter = torch.zeros(positions, packed_size(d), device=self.device)
                self.image_size = tuple(images.shape[2:])
            check_image_size(images, self.image_size, "PaDiM")
            gaussian_update(layers, self.channels, self.count, mean, scatter)
            self.count += len(images)
        if self.count < 2:
            raise InputError(f"PaDiM needs at least 2 images to fit a covariance, got {self.count}")
        gaussian_factor(scatter, len(self.channels), self.count, self.settings.ridge)
        self.mean, self.factor = mean, scatter.to(getattr(torch, self.factor_dtype))
        return self

    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly maps and image scores.

        Args:
            images: (B, 3, H, W) float, normalised; H and W as in `fit`.

        Returns:
            maps (B, H, W): distances, upsampled and smoothed with a Gaussian of sigma 4 pixels;
            scores (B,): the maximum of each map. Both float32, neither scaled by other images.

        Raises:
            InputError: not fitted, another image size than fitted, features that are not finite.
        """
        if self.factor is None:
            raise InputError("this PaDiM is not fitted: call fit() or load() first")
        layers = self.features(images)
        check_image_size(images, self.image_size, "PaDiM")
        distances = mahalanobis_map(layers, self.channels, self.mean, self.factor)
        along_y, along_x = (
            smooth_upsample_matrix(n_in, n_out, border=self.settings.border).to(distances)
            for n_in, n_out in zip(distances.shape[1:], self.image_size)
        )
        maps = along_y @ distances @ along_x.mT
        return maps, maps.amax((1, 2))

    def save(self, path: str | Path) -> None:
        """Write everything that scoring needs, the network's weights included, to one file."""
        if self.factor is None:
            raise InputError("this PaDiM is not fitted: there is nothing to save")
        state = {
            "format": FORMAT,
            "version": VERSION,
            "backbone": self.backbone,
            "preset": self.preset,
            "factor_dtype": self.factor_dtype,
            "count": self.count,
            "image_size": list(self.image_size),
            "channels": self.channels.cpu(),
            "mean": self.mean.cpu(),
            "factor": self.factor.cpu(),
            "network": {k: v.cpu() for k, v in self.network.state_dict().items()},
        }
        save_state(path, state)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "PaDiM":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or is not a saved PaDiM.
        """
        state = read_marked(path, "PaDiM", FORMAT, VERSION)
        model = cls.__new__(cls)
        try:
            model._configure(state["backbone"], state["preset"], state["factor_dtype"], device)
            model.network = feature_network(new_backbone(state["backbone"]), model.device)
            model.network.load_state_dict(state["network"])
            model.count, model.image_size = state["count"], tuple(state["image_size"])
            for name in ("channels", "mean", "factor"):
                setattr(model, name, state[name].to(model.device))
        except (KeyError, RuntimeError) as error:  # a part is missing or of another shape
            raise InputError(f"{path} is a damaged PaDiM: {error}") from error
        return model
