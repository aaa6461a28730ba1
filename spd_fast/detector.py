"""What the detectors share: features of a network, the checks around them, and marked files."""

from pathlib import Path

import torch
from torch import Tensor, nn

from spd_fast.errors import InputError
from spd_fast.files import read_state
from spd_fast.models import FeatureLayers


def feature_network(backbone: nn.Module, device: torch.device) -> FeatureLayers:
    """The stem and layer1 to layer3 of a ResNet, ready to be read on a device."""
    return FeatureLayers(backbone).eval().to(device, memory_format=torch.channels_last)


def read_layers(network: FeatureLayers, images: Tensor, backbone: str) -> list[Tensor]:
    """layer1 to layer3 of (B, 3, H, W) normalised images: (B, C_l, H / 2^(l+1), ...).

    Raises:
        InputError: wrong shape or dtype, or the network's output is not finite; the message calls
            the network `backbone`.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            f"images must be a float (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    device = next(network.parameters()).device
    images = images.to(device, torch.float32, memory_format=torch.channels_last)
    with torch.inference_mode():
        layers = network(images)
    for number, layer in enumerate(layers, 1):
        if not bool(layer.isfinite().all()):
            bad = (~layer.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise InputError(
                f"layer{number} of {backbone} has NaN or infinite features for images "
                f"{bad} of the batch: check the images and the weights"
            )
    return layers


def check_image_size(images: Tensor, fitted: tuple[int, int], detector: str) -> None:
    """Refuse (B, 3, H, W) images of another size than the detector was fitted on."""
    if tuple(images.shape[2:]) != fitted:
        raise InputError(
            f"images are {' x '.join(map(str, images.shape[2:]))} pixels, but this {detector} was "
            f"fitted on {' x '.join(map(str, fitted))}"
        )


def read_marked(path: str | Path, detector: str, mark: str, version: int) -> dict:
    """What a detector's `save` wrote: a dictionary with its mark and version.

    Raises:
        InputError: the file is missing, damaged, something else, or of another version.
    """
    state = read_state(path, f"a saved {detector}")
    if not isinstance(state, dict) or state.get("format") != mark:
        raise InputError(f"{path} is not a saved {detector}: it lacks the mark {mark!r}")
    if state.get("version") != version:
        raise InputError(
            f"{path} has version {state.get('version')}, this spd-fast reads {version}"
        )
    return state
