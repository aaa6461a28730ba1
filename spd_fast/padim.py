"""PaDiM: one Gaussian per position of the feature grid, fitted to normal images.

Defard et al., "PaDiM", ICPR workshops 2021; the paper's 1-class method (section 5).
"""

import hashlib
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

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
from spd_fast.ops.factor import converted, factor_width, find_dtype
from spd_fast.ops.mahalanobis import gaussian_factor, gaussian_update, mahalanobis_map
from spd_fast.ops.memory import on_huge_pages
from spd_fast.preprocess import Preset, find_preset
from spd_fast.reference import packed_size

FORMAT, VERSION = "spd-fast padim", 2
FACTOR_BLOCK = 512  # positions factorised between two looks at the progress bar
FIT_BLOCK = 32  # images folded in at a time: the scatter is read and written once for all of them
# Kept channels: of the PaDiM paper, and for ResNet-50 by analogy with WideResNet-50.
N_FEATURES = {"resnet18": 100, "resnet50": 550, "wide_resnet50_2": 550}


@dataclass(frozen=True)
class PaDiMPreset(Preset):
    """How one reference system prepares images and smooths maps, and what its PaDiM does."""

    ridge: float  # added to the diagonal of the covariances


PRESETS = {
    "paper": PaDiMPreset(
        shorter_side=256,
        size=224,
        resampling=Image.Resampling.LANCZOS,
        border="symmetric",
        ridge=0.01,
    ),
    "anomalib": PaDiMPreset(
        shorter_side=None, size=256, resampling=None, border="reflect", ridge=0.01 + 1e-5
    ),
}


class PaDiM:
    """Anomaly detector with a Gaussian per position.

    Fitting streams over the images: memory does not grow with their number. The covariances are
    kept as packed whitening factors, about half (float32), a quarter (float16) or an eighth (int8)
    of the bytes of their inverses.

    `fit` does it all; `update`, `merge` and `finish` are its steps, for a loop of your own.

    Args:
        backbone: a torchvision ResNet by name; features are those of its layer1 to layer3.
        n_features: channels kept at random of all that the layers have; None: as in the PaDiM
            paper, 100 for resnet18 and 550 for resnet50 and wide_resnet50_2.
        preset: "paper" or "anomalib", see `PRESETS`.
        factor_dtype: "float32"; "float16" or "int8" for less memory and, one image at a time, less
            time, with maps that differ by about 0.1 % or 1 % (docs/method.md says when by more); or
            "bfloat16", which the CPU's fast backend does not take.
        weights: "imagenet", "random", or a file: our checkpoint or a torchvision state dict.
        seed: of the choice of channels, and of random weights.
        device: where the network and the Gaussians live.
        compile: run the network through torch.compile, which needs a C++ compiler on a CPU; the
            first batch of every size then takes minutes.

    Raises:
        InputError: an unknown name, weights that cannot be had or do not fit the backbone, or no
            C++ compiler to compile with.
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
        compile: bool = False,
    ):
        self._configure(backbone, preset, factor_dtype, device)
        if compile:
            check_can_compile(self.device)
        module = load_backbone(backbone, weights, seed=seed)
        self.network, self._run = feature_network(module, self.device, compile)
        total = sum(channels_of_layers(self.network))
        wanted = N_FEATURES.get(backbone) if n_features is None else n_features
        if wanted is None:
            raise InputError(f"n_features has no default for {backbone}: give it (at most {total})")
        try:
            wanted = operator.index(wanted)
        except TypeError:
            raise InputError(f"n_features must be a whole number, got {wanted!r}") from None
        if not 1 <= wanted <= total:
            raise InputError(f"n_features must be 1..{total} for {backbone}, got {wanted}")
        # Sorted, so that neighbours in the list are neighbours in the feature maps.
        generator = torch.Generator().manual_seed(seed)
        self.channels = torch.randperm(total, generator=generator)[:wanted].sort().values
        self.channels = self.channels.to(self.device)

    def _configure(self, backbone: str, preset: str, factor_dtype: str, device) -> None:
        find_dtype(factor_dtype)
        self.backbone, self.preset, self.factor_dtype = backbone, preset, factor_dtype
        self.settings = find_preset(preset, PRESETS)
        self.device = pick_device(device)
        self.channels = None
        self._forget()

    def _forget(self) -> None:
        self.count = 0  # images fitted
        self.image_size: tuple[int, int] | None = None
        self.grid: tuple[int, int] | None = None  # height and width of layer1
        self.mean = self.factor = None
        self._scatter = None  # while fitting; becomes the factor

    def features(self, images: Tensor) -> list[Tensor]:
        """layer1 to layer3 of (B, 3, H, W) normalised images: (B, C_l, H / 2^(l+1), ...).

        Raises:
            InputError: wrong shape or dtype, or the network's output is not finite.
        """
        layers = read_layers(self._run, images)
        refuse_not_finite(layers, self.backbone)
        return layers

    def fit(self, batches: Iterable[Tensor], distributed: bool = False) -> "PaDiM":
        """Fit to normal images, forgetting what was fitted before.

        Args:
            batches: of (B, 3, H, W) float images, normalised as `spd_fast.preprocess` does; all of
                one size.
            distributed: `batches` are this rank's part of the images, and every rank ends with the
                model of all; torch.distributed must be initialised, as by torchrun.

        Returns:
            self.

        Raises:
            InputError: fewer than two images, several image sizes, features that are not finite,
                or a rank without an image.
        """
        if distributed and not dist.is_initialized():
            raise InputError("a distributed fit needs torch.distributed.init_process_group first")
        self._forget()
        try:
            if distributed:
                self._fold_part(batches)
            else:
                self._fold_all(batches)
            return self.finish()
        except BaseException:
            self._forget()  # no images of this fit may enter the next one
            raise

    def _fold_all(self, batches: Iterable[Tensor]) -> None:
        waiting: list[list[Tensor]] = []
        for images in batches:
            layers = self._layers_to_fit(images)
            if len(images) >= FIT_BLOCK and not waiting:
                self._fold(layers, self.channels)
                continue
            layers, places = keep_channels(layers, self.channels)  # what waits takes memory
            waiting.append(layers)
            if sum(len(layers[0]) for layers in waiting) >= FIT_BLOCK:
                self._fold(_joined(waiting), places)
                waiting = []
        if waiting:
            self._fold(_joined(waiting), places)

    def _fold_part(self, batches: Iterable[Tensor]) -> None:
        """Fold this rank's images, then merge all ranks'; a rank in trouble tells the others."""
        trouble = None
        try:
            self._fold_all(batches)
        except InputError as error:
            trouble = str(error)
        own = self.count, trouble, self._identity() if self.count else None
        ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        for rank, (_, reason, _) in enumerate(ranks):
            if reason:
                raise InputError(f"rank {rank} cannot fit its images: {reason}")
        counts = [count for count, *_ in ranks]
        if not all(counts):
            raise InputError(f"every rank needs an image to fit, they have {counts}")
        for rank, (*_, identity) in enumerate(ranks):
            _refuse_other_model(own[2], identity, f"rank {dist.get_rank()} and rank {rank}")
        self._merge_ranks(sum(counts))

    def update(self, images: Tensor) -> "PaDiM":
        """Fold (B, 3, H, W) normal images in. Best in batches of 32; `finish` ends the fit."""
        self._fold(self._layers_to_fit(images), self.channels)
        return self

    def merge(self, other: "PaDiM") -> "PaDiM":
        """Add the images that `other` was given by `update`; neither may be finished yet.

        Raises:
            InputError: one of them is finished or has no images, or they differ in backbone,
                weights, preset, kept channels or image size.
        """
        for model in (self, other):
            if model._scatter is None or not model.count:
                raise InputError("merge needs two PaDiMs with images, before finish()")
        _refuse_other_model(self._identity(), other._identity(), "these")
        total = self.count + other.count
        shift = other.mean - self.mean
        self._add_outer_product(shift, self.count * other.count / total)
        self._scatter += other._scatter
        self.mean += shift * (other.count / total)
        self.count = total
        return self

    def finish(self) -> "PaDiM":
        """Turn the running scatter into the factor; the memory of the scatter becomes its own.

        Raises:
            InputError: fewer than two images.
        """
        if self.factor is not None:
            raise InputError("this PaDiM is finished already: fit() starts anew")
        if self.count < 2:
            raise InputError(f"PaDiM needs at least 2 images to fit a covariance, got {self.count}")
        scatter, self._scatter = self._scatter, None  # nobody else holds it, see `converted`
        d, dtype = len(self.channels), find_dtype(self.factor_dtype)
        try:
            with tqdm(total=len(scatter), desc="covariances", unit="position", delay=2) as progress:
                for block in scatter.split(FACTOR_BLOCK):
                    gaussian_factor(block, d, self.count, self.settings.ridge)
                    progress.update(len(block))
            self.factor = converted(scatter, d, dtype, consume=True)
        except BaseException:
            self._forget()
            raise
        return self

    def _identity(self) -> dict:
        """What two models must share for their images to be counted together."""
        digest = hashlib.sha256()
        for values in self.network.state_dict().values():
            digest.update(values.cpu().contiguous().numpy())
        return {
            "backbone": self.backbone,
            "weights": digest.hexdigest()[:16],
            "preset": self.preset,
            "image size": self.image_size,
            "channels": self.channels.tolist(),
        }

    def _layers_to_fit(self, images: Tensor) -> list[Tensor]:
        if self.factor is not None:
            raise InputError("this PaDiM is finished: fit() starts anew")
        layers = self.features(images)
        if self.image_size is None:
            self.image_size, self.grid = tuple(images.shape[2:]), tuple(layers[0].shape[2:])
        check_image_size(images, self.image_size, "PaDiM")
        return layers

    def _fold(self, layers: list[Tensor], channels: Tensor) -> None:
        if self._scatter is None:
            positions, d = self.grid[0] * self.grid[1], len(self.channels)
            with torch.inference_mode(False):  # `merge` may come outside of it
                self.mean = torch.zeros(positions, d, device=self.device)
                scatter = torch.empty(positions, packed_size(d), device=self.device)
                self._scatter = on_huge_pages(scatter).zero_()
        gaussian_update(layers, channels, self.count, self.mean, self._scatter)
        self.count += len(layers[0])

    def _add_outer_product(self, x: Tensor, weight: float) -> None:
        """scatter += weight x x^T for x (P, d): what folding one image sqrt(2 weight) x into the
        mean 0 of one image before adds."""
        d = len(self.channels)
        image = ((2 * weight) ** 0.5 * x).view(1, *self.grid, d).permute(0, 3, 1, 2)
        every = torch.arange(d, device=self.device)
        gaussian_update([image], every, 1, torch.zeros_like(self.mean), self._scatter)

    def _merge_ranks(self, total: int) -> None:
        """Every rank's scatter is moved to the common mean; then they only add up."""
        mean = self.mean.double() * (self.count / total)
        dist.all_reduce(mean)
        self._add_outer_product(self.mean - mean.float(), self.count)
        for part in self._scatter.split(64):  # so that no large buffer is needed
            dist.all_reduce(part)
        self.mean, self.count = mean.float(), total

    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly maps and image scores.

        Args:
            images: (B, 3, H, W) float, normalised; H and W as in `fit`.

        Returns:
            maps (B, H, W): distances, upsampled and smoothed with a Gaussian of sigma 4 pixels;
            scores (B,): the maximum of each map. Both float32, neither scaled by other images.

        Raises:
            InputError: not fitted, another image size than fitted, features that are not finite, or
                a loaded model that is damaged.
        """
        if self.factor is None:
            raise InputError("this PaDiM is not fitted: call fit() or load() first")
        layers = read_layers(self._run, images)
        check_image_size(images, self.image_size, "PaDiM")
        distances = mahalanobis_map(layers, self.channels, self.mean, self.factor)
        if not bool(distances.isfinite().all()):  # much smaller than the layers, which cause it
            refuse_not_finite(layers, self.backbone)
            self._refuse_damaged((~distances.isfinite()).any(0).flatten().nonzero()[:, 0])
            raise InputError(
                f"features of {self.backbone} are too large to score, or this PaDiM is damaged: "
                "their distances overflow"
            )
        maps = smooth_upsample(distances, self.image_size, border=self.settings.border)
        return maps, maps.amax((1, 2))

    def _refuse_damaged(self, positions: Tensor) -> None:
        """Raise InputError if a Gaussian of these is not finite."""
        factor = converted(self.factor[positions], len(self.channels), torch.float32)
        sound = factor.isfinite().all(1) & self.mean[positions].isfinite().all(1)
        if not bool(sound.all()):
            raise InputError(
                "this PaDiM is damaged, load another copy or fit again: its Gaussian of position "
                f"{int(positions[~sound][0])} is not finite"
            )

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
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", compile: bool = False
    ) -> "PaDiM":
        """Read what `save` wrote.

        On the CPU the factor stays in the file, mapped into memory: while the model lives, replace
        the file (as `save` does) or remove it, but never write into it.

        Raises:
            InputError: the file is missing or is not a saved PaDiM, or there is no C++ compiler to
                compile with.
        """
        if compile:
            check_can_compile(pick_device(device))
        state = read_marked(path, "a saved PaDiM", FORMAT, VERSION, mmap=True)
        model = cls.__new__(cls)
        try:
            model._configure(state["backbone"], state["preset"], state["factor_dtype"], device)
            backbone = new_backbone(state["backbone"])
            model.network, model._run = feature_network(backbone, model.device, compile)
            model.network.load_state_dict(state["network"])
            model.count, model.image_size = int(state["count"]), tuple(state["image_size"])
            for name in ("channels", "mean", "factor"):
                setattr(model, name, state[name].to(model.device))
            positions, d = model.mean.shape
            width = factor_width(d, find_dtype(model.factor_dtype))
            if model.factor.shape != (positions, width) or model.channels.shape != (d,):
                raise ValueError("its channels, means and factors do not fit each other")
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, InputError) as error:
            raise InputError(f"{path} is a damaged PaDiM: {error}") from error
        return model


def keep_channels(layers: list[Tensor], channels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Layers (B, C_l, h_l, w_l) without the channels that are not among `channels` (d,), and the
    places (d,) of those in what remains. A layer keeps one at least, for it may tell the grid."""
    kept, places, start, count = [], torch.empty_like(channels), 0, 0
    for layer in layers:
        end = start + layer.shape[1]
        mine = ((channels >= start) & (channels < end)).nonzero()[:, 0]
        own = channels[mine] - start if len(mine) else channels.new_zeros(1)
        pixels = layer.permute(0, 2, 3, 1)  # as the network leaves them: channels last
        rows = pixels.flatten(0, 2).index_select(1, own)  # far faster in 2-D
        kept.append(rows.view(*pixels.shape[:3], len(own)).permute(0, 3, 1, 2))
        places[mine] = count + torch.arange(len(mine), device=channels.device)
        start, count = end, count + len(own)
    return kept, places


def _joined(batches: list[list[Tensor]]) -> list[Tensor]:
    return batches[0] if len(batches) == 1 else [torch.cat(layer) for layer in zip(*batches)]


def _refuse_other_model(mine: dict, theirs: dict, who: str) -> None:
    different = [name for name in mine if mine[name] != theirs[name]]
    if different:
        raise InputError(f"{who} PaDiMs cannot be merged: they differ in {', '.join(different)}")
