"""PaDiM of anomalib (https://github.com/open-edge-platform/anomalib) with our scorer and our fit.

    from spd_fast.integrations.anomalib import StreamingPadim, accelerate

`accelerate` takes a `Padim` or `PadimModel` that anomalib has fitted and returns one that gives the
same maps and scores, faster and with half the memory or less. `StreamingPadim` takes the place of
`Padim` before fitting: memory does not grow with the number of images. Everything around the scorer
(`Engine`, pre- and post-processor, metrics, thresholds, callbacks) is anomalib's own.

Such a model cannot be exported to ONNX or OpenVINO: load the state dict of `accelerate(model)` into
a plain `Padim` and export that.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast.detector import smooth_upsample
from spd_fast.errors import InputError
from spd_fast.ops.factor import blocks_of_matrices, converted, factor_from, find_dtype
from spd_fast.ops.mahalanobis import gaussian_factor, gaussian_update, mahalanobis_map
from spd_fast.ops.memory import on_huge_pages
from spd_fast.padim import PRESETS
from spd_fast.reference import packed_size, unpack

try:
    from anomalib.data import Batch, InferenceBatch
    from anomalib.models import Padim
    from anomalib.models.image.padim.torch_model import PadimModel
    from anomalib.post_processing import PostProcessor
except ImportError as error:
    raise ImportError(
        "spd_fast.integrations.anomalib needs anomalib: pip install 'spd-fast[anomalib]'"
    ) from error

RIDGE = PRESETS["anomalib"].ridge  # it adds it to the covariance in two steps
ROUNDING = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-3, "int8": 1e-2}  # of a score


def accelerate(model: Padim | PadimModel, factor_dtype: str | None = None) -> Padim | PadimModel:
    """The fitted model with our scorer.

    Of a `Padim` the `.model` is replaced, in place. Of a `PadimModel` a new one is made, which
    shares the backbone, whose weights become channels-last; while both live, memory holds the
    inverse covariances and the factors.
    What has our scorer already is changed in place.
    The state dict stays anomalib's in keys and shapes, for which the inverse covariances are made
    anew each time: at 550 channels and 256 x 256 pixels 4.6 GiB.
    anomalib sets a threshold to the score of one validation image or pixel, which is normal then.
    That its label is not left to rounding, thresholds are raised by 1e-5, float16 1e-3, int8 1e-2
    of themselves; other scores that little above them become normal, too. `Engine.validate` sets
    them anew.

    Args:
        model: fitted by anomalib (`Engine.fit`, or loaded from its checkpoint), or by
            `StreamingPadim`, whose state dict then becomes anomalib's as well.
        factor_dtype: as for `spd_fast.PaDiM`; "float16" and "int8" take less memory and, one image
            at a time, less time, and scores differ by up to 1e-3 and about 1e-2, normalised
            ones by a little more (1.3e-3 and 1.3e-2 were seen). None: as it is, or "float32"
            for anomalib's own.

    Raises:
        InputError: not one of these classes, not fitted, or an inverse covariance that is not
            positive definite.
    """
    if isinstance(model, Padim):
        was_ours = isinstance(model.model, FastPadimModel)
        before = ROUNDING[model.model.factor_dtype] if was_ours else 0
        model.model = accelerate(model.model, factor_dtype)
        after = ROUNDING[model.model.factor_dtype]
        if after > before and isinstance(model.post_processor, PostProcessor):
            with torch.no_grad():  # NaN before the first validation
                for name in ("_image_threshold", "_pixel_threshold"):
                    getattr(model.post_processor, name).mul_((1 + after) / (1 + before))
        return model
    if not isinstance(model, PadimModel):
        raise InputError(
            f"expected a fitted anomalib Padim or PadimModel, got {type(model).__name__}"
        )
    is_ours = isinstance(model, FastPadimModel)
    if not (model.is_fitted if is_ours else model.gaussian.inv_covariance.numel()):
        raise InputError("this Padim is not fitted: run Engine.fit or load a checkpoint first")
    factor_dtype = factor_dtype or (model.factor_dtype if is_ours else "float32")
    fast = model if is_ours else FastPadimModel(model, factor_dtype)
    fast.factor = converted(fast.factor, len(fast.idx), find_dtype(factor_dtype))
    fast.factor_dtype, fast.packed_state = factor_dtype, False
    return fast


class FastPadimModel(PadimModel):
    """anomalib's `PadimModel` with a packed whitening factor in place of the inverse covariance.

    The state dict holds the buffers `mean` (P, d) and `factor` as in `spd_fast.ops.factor`,
    channels in rising order, if `packed_state`; else `gaussian.mean` and
    `gaussian.inv_covariance` as anomalib has them. Either form is understood when loading.

    Args:
        padim: fitted or not; its modules are shared, not copied.
        factor_dtype: as for `spd_fast.PaDiM`.
    """

    def __init__(self, padim: PadimModel, factor_dtype: str = "float32", packed_state=False):
        nn.Module.__init__(self)  # not PadimModel's, which would make another backbone
        for name, value in vars(padim).items():
            self.__dict__[name] = value.copy() if isinstance(value, dict) else value
        gaussian = self._modules.pop("gaussian")
        self.factor_dtype, self.packed_state = factor_dtype, packed_state
        self.running: tuple[int, Tensor, Tensor] | None = None  # count, mean, scatter while fitting
        mean, factor = _from_anomalib(
            gaussian.mean, gaussian.inv_covariance, self.idx, find_dtype(factor_dtype)
        )
        self.register_buffer("mean", mean)
        self.register_buffer("factor", factor)
        # The Gaussian is known by its kernel alone, a product of two equal ones that sum to one.
        taps = self.anomaly_map_generator.blur.kernel[0, 0].double().sum(0)
        self.radius = len(taps) // 2
        ratio = taps[self.radius] / taps[self.radius + 1]  # exp(1 / (2 sigma^2))
        self.sigma = float((2 * ratio.log()).rsqrt())
        # Convolutions are faster so on a CPU, and our scorer finds a position's channels together.
        self.feature_extractor.to(memory_format=torch.channels_last)

    @property
    def is_fitted(self) -> bool:
        return self.factor.numel() > 0

    @torch.no_grad()
    def forward(self, input_tensor: Tensor) -> InferenceBatch:
        """Of images (N, 3, H, W): `anomaly_map` (N, 1, H, W) and `pred_score` (N, 1).

        Raises:
            InputError: in training mode, not fitted, or images of another size than fitted.
        """
        if self.training:
            raise InputError(
                "this Padim only scores: call eval(), or fit a StreamingPadim through its Engine"
            )
        if not self.is_fitted:
            raise InputError("this Padim is not fitted: run Engine.fit or load a checkpoint first")
        layers, channels = self.layers_and_channels(input_tensor)
        grid = layers[0].shape[2] * layers[0].shape[3]
        if grid != len(self.mean):
            raise InputError(
                f"images are {' x '.join(map(str, input_tensor.shape[2:]))} pixels, of which "
                f"{self.layers[0]} makes {grid} positions; this Padim was fitted with "
                f"{len(self.mean)}"
            )
        distances = mahalanobis_map(layers, channels, self.mean, self.factor)
        smoothing = dict(sigma=self.sigma, radius=self.radius, border="reflect")
        maps = smooth_upsample(distances, tuple(input_tensor.shape[2:]), **smoothing)[:, None]
        return InferenceBatch(pred_score=maps.amax((2, 3)), anomaly_map=maps)

    @torch.no_grad()
    def update(self, images: Tensor) -> None:
        """Fold images (N, 3, H, W) into the running mean and scatter, for `fit`."""
        layers, channels = self.layers_and_channels(images)
        if self.running is None:
            positions, d = layers[0].shape[2] * layers[0].shape[3], len(channels)
            mean = torch.zeros(positions, d, device=channels.device)
            scatter = torch.empty(positions, packed_size(d), device=channels.device)
            self.running = 0, mean, on_huge_pages(scatter).zero_()
        count, mean, scatter = self.running
        gaussian_update(layers, channels, count, mean, scatter)
        self.running = count + len(images), mean, scatter

    def fit(self) -> None:
        """Turn what `update` has gathered into the mean and the factor.

        Raises:
            InputError: fewer than two images.
        """
        count, mean, scatter = self.running or (0, self.mean, self.factor)
        if count < 2:
            raise InputError(f"PaDiM needs at least 2 images to fit a covariance, got {count}")
        self.running = None  # whatever happens: what follows changes the scatter in place
        gaussian_factor(scatter, len(self.idx), count, RIDGE)
        dtype = find_dtype(self.factor_dtype)
        self.mean, self.factor = mean, converted(scatter, len(self.idx), dtype, consume=True)

    def layers_and_channels(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """What our operations take; the kept channels come in rising order."""
        features = self.feature_extractor(self.tiler.tile(images) if self.tiler else images)
        layers = [features[name] for name in self.layers]
        grid = layers[0].shape[2:]
        if not self.tiler and all(
            _nearest_is_exact(*sizes) for layer in layers for sizes in zip(layer.shape[2:], grid)
        ):
            return layers, self.idx.sort().values
        embedding = self.generate_embedding(features)
        if self.tiler:
            embedding = self.tiler.untile(embedding)
        return [embedding], self.idx.argsort()

    def state_dict(self, *args, prefix: str = "", **kwargs) -> dict:
        """As anomalib's, weights in its memory order: safetensors writes no other."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in [name for name in state if name.startswith(prefix)]:
            state[name] = state[name].contiguous()
        return state

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed_state:
            return
        mean, factor = destination.pop(f"{prefix}mean"), destination.pop(f"{prefix}factor")
        mean, inverse = _to_anomalib(mean, factor, self.idx)
        destination[f"{prefix}gaussian.mean"] = mean
        destination[f"{prefix}gaussian.inv_covariance"] = inverse

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        theirs = f"{prefix}gaussian.mean", f"{prefix}gaussian.inv_covariance", f"{prefix}idx"
        if all(key in state_dict for key in theirs):
            mean, inverse = state_dict.pop(theirs[0]), state_dict.pop(theirs[1])
            state_dict[f"{prefix}mean"], state_dict[f"{prefix}factor"] = _from_anomalib(
                mean, inverse, state_dict[theirs[2]], find_dtype(self.factor_dtype)
            )
        for name in ("mean", "factor"):  # their shapes depend on the image size
            if f"{prefix}{name}" in state_dict:
                given = state_dict[f"{prefix}{name}"]
                if name == "factor" and given.numel():
                    given = converted(given, len(self.idx), find_dtype(self.factor_dtype))
                    state_dict[f"{prefix}factor"] = given
                setattr(self, name, torch.empty_like(given, device=self.idx.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class StreamingPadim(Padim):
    """anomalib's `Padim`, fitted as its batches come: memory does not grow with the images.

    Takes the place of `Padim` wherever one is made, the `Engine` and checkpoints included; scores
    and metrics are the same. Its checkpoints hold the packed factors, so a plain `Padim` cannot
    load them, but can load the state dict of `accelerate(model)`. A fit is not resumed from the
    middle of its one epoch.

    Args:
        factor_dtype: as for `spd_fast.PaDiM`. All others are those of `Padim`.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: list[str] = ["layer1", "layer2", "layer3"],  # noqa: B006
        pre_trained: bool = True,
        n_features: int | None = None,
        pre_processor=True,
        post_processor=True,
        evaluator=True,
        visualizer=True,
        factor_dtype: str = "float32",
    ):
        super().__init__(
            backbone,
            layers,
            pre_trained,
            n_features,
            pre_processor,
            post_processor,
            evaluator,
            visualizer,
        )
        self.model = FastPadimModel(self.model, factor_dtype, packed_state=True)

    def on_train_start(self) -> None:
        """Forget the images of a fit that was broken off."""
        super().on_train_start()
        self.model.running = None

    def training_step(self, batch: Batch, *args, **kwargs) -> Tensor:
        """Fold the batch into the running statistics; the loss is a dummy, as in `Padim`."""
        if not self._is_fitted:  # else a later epoch, which changes nothing in `Padim` either
            self.model.update(batch.image)
        return torch.tensor(0.0, requires_grad=True, device=self.device)


@lru_cache(maxsize=256)
def _nearest_is_exact(n_in: int, n_out: int) -> bool:
    """Whether torch's nearest interpolation reads row y * n_in // n_out, as our operations do.

    It multiplies by n_in / n_out in float32, which for a few odd sizes (16 to 122, for one) falls
    just below a whole number.
    """
    rows = torch.arange(n_in, dtype=torch.float32).view(1, 1, n_in, 1)
    read = F.interpolate(rows, size=(n_out, 1), mode="nearest").flatten()
    return torch.equal(read.long(), torch.arange(n_out) * n_in // n_out)


@torch.no_grad()
def _from_anomalib(
    mean: Tensor, inverse: Tensor, idx: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """mean (d, P), S^-1 (P, d, d) with channels as in idx -> (P, d), packed W, channels rising.

    W is lower triangular with S^-1 = W^T W. With J reversing rows or columns, J S^-1 J = C C^T by
    Cholesky, so S^-1 = (J C J)(J C J)^T, and W = (J C J)^T is lower triangular as C is.
    """
    if not inverse.numel():
        return torch.empty(0, device=idx.device), torch.empty(0, device=idx.device)
    order = idx.argsort()

    def whitening(block: slice) -> Tensor:
        p = inverse[block].double()[:, order][:, :, order]
        p = (p + p.mT) / 2  # inverted in float32, it is not quite symmetric
        try:
            c = torch.linalg.cholesky(p.flip(1, 2))
        except torch.linalg.LinAlgError as error:
            raise InputError(f"an inverse covariance is not positive definite: {error}") from error
        return c.flip(1, 2).mT

    factor = factor_from(whitening, *inverse.shape[:2], dtype, inverse.device)
    return mean.T[:, order].float().contiguous(), factor


@torch.no_grad()
def _to_anomalib(mean: Tensor, factor: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_from_anomalib`."""
    if not factor.numel():
        return torch.empty(0, device=idx.device), torch.empty(0, device=idx.device)
    back = idx.argsort().argsort()
    positions, d = mean.shape
    inverse = torch.empty(positions, d, d, device=factor.device)
    for block in blocks_of_matrices(positions, d):
        w = unpack(converted(factor[block], d, torch.float32), d)
        inverse[block] = (w.mT @ w)[:, back][:, :, back]
    return mean[:, back].T.contiguous(), inverse
