"""What the detectors share: features of a network, the checks around them, and marked files."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spd_fast.errors import InputError
from spd_fast.models import FeatureLayers
from spd_fast.reference import smooth_upsample_matrix


def feature_network(
    backbone: nn.Module, device: torch.device, compile: bool = False
) -> tuple[FeatureLayers, nn.Module]:
    """The stem and layer1 to layer3 of a ResNet on a device, and what to call in its place: itself,
    or what torch.compile makes of it.

    Its batch norms are folded into the convolutions before them: it can only be read.
    """
    network = FeatureLayers(backbone).eval()
    _fold_batch_norms(network)
    network = network.to(device, memory_format=torch.channels_last)
    return network, torch.compile(network) if compile else network


def _fold_batch_norms(module: nn.Module) -> None:
    """In torchvision's ResNets a batch norm follows its convolution in the order of definition."""
    convolution = None
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), child))
            setattr(module, name, nn.Identity())
        convolution = name
        _fold_batch_norms(child)


def read_layers(network: nn.Module, images: Tensor) -> list[Tensor]:
    """layer1 to layer3 of (B, 3, H, W) normalised images: (B, C_l, H / 2^(l+1), ...).

    Raises:
        InputError: wrong shape or dtype.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a float tensor (B, 3, H, W), got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            f"images must be a float (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    device = next(network.parameters()).device
    images = images.to(device, torch.float32, memory_format=torch.channels_last)
    with torch.inference_mode():
        return network(images)


def channels_of_layers(network: nn.Module) -> list[int]:
    """Of layer1 to layer3, or whichever the network gives."""
    device = next(network.parameters()).device
    with torch.inference_mode():
        return [layer.shape[1] for layer in network(torch.zeros(1, 3, 64, 64, device=device))]


def refuse_not_finite(layers: list[Tensor], backbone: str) -> None:
    """Raise InputError if a feature is NaN or infinite; `backbone` is what it calls the network."""
    for number, layer in enumerate(layers, 1):
        if not bool(layer.isfinite().all()):
            bad = (~layer.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise InputError(
                f"layer{number} of {backbone} has NaN or infinite features for images "
                f"{bad} of the batch: check the images and the weights"
            )


def check_image_size(images: Tensor, fitted: tuple[int, int], detector: str) -> None:
    """Refuse (B, 3, H, W) images of another size than the detector was fitted on."""
    if tuple(images.shape[2:]) != fitted:
        raise InputError(
            f"images are {' x '.join(map(str, images.shape[2:]))} pixels, but this {detector} was "
            f"fitted on {' x '.join(map(str, fitted))}"
        )


@lru_cache(maxsize=32)
def _smoothing(n_in: int, n_out: int, **smoothing) -> np.ndarray:
    """As an array, since a tensor would remember the mode it was first asked for in."""
    return smooth_upsample_matrix(n_in, n_out, **smoothing).numpy()


@lru_cache(maxsize=32)
def _smoothing_on(device: torch.device, n_in: int, n_out: int, **smoothing) -> Tensor:
    """On a GPU, once: copying it there would hold up the stream."""
    with torch.inference_mode(False):
        return torch.from_numpy(_smoothing(n_in, n_out, **smoothing)).to(device)


def smooth_upsample(distances: Tensor, size: tuple[int, int], **smoothing) -> Tensor:
    """(B, h, w) distances -> (B, *size) maps, as `reference.smooth_upsample_matrix` says."""
    axes = list(zip(distances.shape[1:], size))
    # On a GPU float32 may mean TF32, which has 11 bits. Tensors of tracers are no plain ones.
    if distances.is_cuda and type(distances) is Tensor:
        along_y, along_x = (_smoothing_on(distances.device, *axis, **smoothing) for axis in axes)
        return (along_y @ distances.double() @ along_x.mT).float()
    along_y, along_x = (
        torch.from_numpy(_smoothing(*axis, **smoothing)).to(distances) for axis in axes
    )
    return along_y @ distances @ along_x.mT
