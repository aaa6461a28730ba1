"""Backbones: torchvision ResNets, and reading weights from wherever they are."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from spd_fast.errors import InputError
from spd_fast.files import read_marked, read_state

CHECKPOINT_FORMAT = "spd-fast checkpoint"
CHECKPOINT_VERSION = 1
WRAPPERS = ("module.", "module.encoder.", "module.encoder_q.")  # torch's example, SimSiam, MoCo
WEIGHTS_FILE = "a checkpoint of spd-fast or a state dict of a torchvision ResNet"


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device is auto, cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for, but torch finds no GPU here")
    return device


def check_can_compile(device: torch.device) -> None:
    """Refuse torch.compile for the CPU without a C++ compiler. It would itself say so only when the
    first images come, in a long traceback.
    """
    if device.type != "cpu" or sys.platform == "win32":
        return
    if os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):  # it fetches one
        return
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(shlex.split(compiler)[0]):
        raise InputError(
            f"torch.compile needs a C++ compiler, but there is no {compiler}: install one, or name "
            "yours in the environment variable CXX"
        )


def resnet_names() -> list[str]:
    """Backbones: every ResNet that torchvision has."""
    names = torchvision.models.list_models(module=torchvision.models)  # not the quantized ones
    return [name for name in names if "resne" in name]


def new_backbone(name: str, **kwargs) -> nn.Module:
    """A torchvision ResNet with fresh random weights.

    Raises:
        InputError: torchvision has no ResNet of that name.
    """
    if name not in resnet_names():
        known = ", ".join(resnet_names())
        raise InputError(f"backbone is one of torchvision's ResNets ({known}); got {name!r}")
    return torchvision.models.get_model(name, weights=None, **kwargs)


def load_backbone(name: str, weights: str | Path, seed: int = 0) -> nn.Module:
    """A torchvision ResNet with given weights.

    Args:
        name: of the architecture.
        weights: "random" (drawn from `seed`, the global generator stays as it is), "imagenet"
            (torchvision's IMAGENET1K_V1), or a file: one of our checkpoints, a torchvision state
            dict with or without the classifier fc, or such a state dict as training scripts save
            it: under the key "state_dict", the names after "module.", "module.encoder." (SimSiam's)
            or "module.encoder_q." (MoCo's), with heads that are ignored.

    Raises:
        InputError: unknown name, weights that cannot be downloaded, or a file that is not there, is
            no checkpoint, or holds another architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs as well
        network = new_backbone(name)
    if weights == "random":
        return network
    state = _download(name) if weights == "imagenet" else _read_state(Path(weights), name)
    state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    problem = _mismatch(network, state)
    if problem:
        held = _architecture_of(state)
        if held:
            raise _wrong_backbone(weights, held, name)
        raise InputError(f"{weights} does not hold the weights of a {name}: {problem}")
    network.load_state_dict(state, strict=False)  # all but fc, as just checked
    return network


def _mismatch(network: nn.Module, state: dict[str, Tensor]) -> str:
    """Why `state` does not fit `network`, fc aside; empty if it does."""
    expected = {k: v.shape for k, v in network.state_dict().items() if not k.startswith("fc.")}
    # Files from before batch norm counted its batches lack the counters; torch fills them in.
    missing = {k for k in expected.keys() - state if not k.endswith("num_batches_tracked")}
    extra = state.keys() - expected
    other = {k for k in expected.keys() & state if expected[k] != state[k].shape}
    return "; ".join(
        f"{len(names)} tensors {how}, such as {min(names)}"
        for names, how in ((missing, "missing"), (extra, "too many"), (other, "of other shape"))
        if names
    )


def _architecture_of(state: dict[str, Tensor]) -> str | None:
    for name in resnet_names():
        with torch.device("meta"):
            if not _mismatch(new_backbone(name), state):
                return name
    return None


def _wrong_backbone(source: str | Path, held: str, asked: str) -> InputError:
    return InputError(f"{source} holds a {held} backbone, but a {asked} was asked for")


def _download(name: str) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # no network, a full disk, a wrong hash, a damaged cache: many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"torchvision's ImageNet weights of {name} cannot be downloaded from {weights.url} "
            f"({reason}): give a file with its state dict instead, or 'random'"
        ) from error


def _read_state(path: Path, name: str) -> dict[str, Tensor]:
    state = read_state(path, WEIGHTS_FILE, mmap=True)  # the network has its own copy soon
    if isinstance(state, dict) and state.get("format") == CHECKPOINT_FORMAT:
        held = read_checkpoint(path)["config"]["backbone"]
        if held != name:
            raise _wrong_backbone(path, held, name)
        return state["backbone"]
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise InputError(f"{path} is not {WEIGHTS_FILE}")
    for prefix in WRAPPERS:
        if prefix + "conv1.weight" in state:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return state


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of `spd_fast.pretrain`, on the CPU.

    Raises:
        InputError: it is missing, damaged, something else, or of another version.
    """
    return read_marked(path, "a checkpoint", CHECKPOINT_FORMAT, CHECKPOINT_VERSION)


class FeatureLayers(nn.Module):
    """The stem and layer1 to layer3 of a ResNet; layer4 is never computed."""

    def __init__(self, resnet: nn.Module):
        super().__init__()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            setattr(self, name, getattr(resnet, name))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> [layer1, layer2, layer3], (B, C_l, H / 2^(l + 1), W / 2^(l + 1))."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        layer1 = self.layer1(x)
        layer2 = self.layer2(layer1)
        return [layer1, layer2, self.layer3(layer2)]
