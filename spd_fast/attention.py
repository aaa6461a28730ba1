"""Attention maps (appendix E of the paper): which parts of a defective image make its features
differ from those of its nearest normal sample."""

import copy
from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast.errors import InputError

BATCH = 8  # images; their activations are kept for the gradient
SAME = 1e-6  # cosine distances below this are rounding errors of float32


def pooled_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Features of images: the output of the last layer, averaged over all places.

    Args:
        backbone: a ResNet of `spd_fast.models.load_backbone`. It is not changed; batch norm uses
            its running statistics, whatever mode it is in.
        images: (N, 3, H, W) float, normalised.

    Returns:
        (N, D) float32, on the CPU.

    Raises:
        InputError: images of another shape or type.
    """
    _check(images, "images")
    features = _features(backbone)
    with torch.no_grad():
        parts = [features(batch.to(backbone.conv1.weight)) for batch in images.split(BATCH)]
    return torch.cat(parts).float().cpu()


def nearest_normal(backbone: nn.Module, image: Tensor, normals: Iterable[Tensor]) -> Tensor:
    """The normal image whose `pooled_features` have the largest cosine with those of `image`.

    Args:
        backbone: as for `pooled_features`.
        image: (3, H, W) float, normalised.
        normals: batches of (N, 3, H', W') float, normalised: the normal training images. One batch
            is held at a time.

    Returns:
        (3, H', W'), of equals the first.

    Raises:
        InputError: there is no normal image, or images of another shape or type.
    """
    own = pooled_features(backbone, image[None])
    best, nearest = -torch.inf, None
    for batch in normals:
        _check(batch, "normals")
        cosines = F.cosine_similarity(own, pooled_features(backbone, batch))
        place = int(cosines.argmax())
        if float(cosines[place]) > best:
            best, nearest = float(cosines[place]), batch[place]
    if nearest is None:
        raise InputError("there is no normal image, expected at least one")
    return nearest


def attention_maps(backbone: nn.Module, images: Tensor, nearest: Tensor) -> Tensor:
    """GradCAM (Selvaraju et al. 2017) of the distance between images and their nearest normals.

    The target is y = -cos(f(image), f(nearest)), f as in `pooled_features`, f(nearest) a constant.
    With A_k the channels of layer4 for the image, of h x w places, the map is

        ReLU(sum_k a_k A_k),    a_k = mean over places of dy / dA_k,

    brought to the image's size bilinearly and divided by its maximum.

    The paper does not give the sign. This one is high where more activation means more distance:
    where the image has what its nearest normal lacks. Multiplying f by a number leaves y as it is,
    so the sum over k has mean 0 over the places, and the other sign would show the rest.

    Args:
        backbone, images: as for `pooled_features`.
        nearest: the same shape: for each what `nearest_normal` returns.

    Returns:
        (N, H, W) float32 in [0, 1], on the CPU. All 0 where features are equal up to rounding.

    Raises:
        InputError: captum is not installed, or images of another shape or type.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError:
        raise InputError("attention maps need: pip install 'spd-fast[paper]'") from None
    _check(images, "images")
    if nearest.shape != images.shape:
        got, expected = tuple(nearest.shape), tuple(images.shape)
        raise InputError(f"nearest has shape {got}, expected that of images, {expected}")
    features = _features(backbone)

    def target(batch: Tensor, wanted: Tensor) -> Tensor:
        return -F.cosine_similarity(features(batch), wanted)

    gradcam = LayerGradCam(target, features.layer4)
    maps = []
    for batch, normal in zip(images.split(BATCH), nearest.split(BATCH)):
        batch = batch.to(backbone.conv1.weight, copy=True).requires_grad_()
        with torch.no_grad():
            wanted = features(normal.to(batch))
            differs = 1 + target(batch, wanted) > SAME
        found = gradcam.attribute(batch, additional_forward_args=wanted, relu_attributions=True)
        found = found.detach() * differs[:, None, None, None]
        maps.append(F.interpolate(found, images.shape[2:], mode="bilinear")[:, 0].float().cpu())
    maps = torch.cat(maps)
    peaks = maps.amax(dim=(1, 2), keepdim=True)
    return maps / peaks.where(peaks > 0, 1)


def _features(backbone: nn.Module) -> nn.Sequential:
    """A copy of the ResNet that ends before fc, so that nothing done to it reaches the original."""
    parts = OrderedDict((n, part) for n, part in backbone.named_children() if n != "fc")
    parts["flatten"] = nn.Flatten()
    return copy.deepcopy(nn.Sequential(parts)).eval().requires_grad_(False)


def _check(images: Tensor, name: str) -> None:
    right = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
    if not right or not len(images):
        raise InputError(
            f"{name} is {tuple(images.shape)} {images.dtype}, expected (N, 3, H, W) floating point"
        )
