"""The 2-class models of the paper (section 5): a ResNet that classifies images, and a U-Net that
segments them, both fine-tuned with the focal loss from a pre-trained backbone."""

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss
from tqdm import tqdm

from spd_fast.detector import check_image_size
from spd_fast.errors import InputError
from spd_fast.files import read_marked, save_state
from spd_fast.models import load_backbone, new_backbone, pick_device
from spd_fast.preprocess import Preset, find_preset
from spd_fast.threads import in_threads

VERSION = 1
TRAINING, TRAINING_VERSION = "spd-fast training", 1
SAVE_EVERY = 200  # steps between two writings of a training that shall survive an interruption
PRESETS = {
    "paper": Preset(shorter_side=None, size=256, resampling=Image.Resampling.BILINEAR, border=None)
}


@dataclass(frozen=True)
class Training:
    """How a 2-class model is fine-tuned.

    The paper gives SGD, a fixed rate, and 80 epochs or a number of iterations (appendix C), and
    names the focal loss; its alpha and gamma are those of Lin et al. 2017. The batch size and what
    SGD has beside the rate are ours.
    """

    epochs: int | None = 80  # over all training images; or ...
    iterations: int | None = None  # ... this many steps
    lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 16
    alpha: float = 0.25  # weight of the anomalous
    gamma: float = 2.0
    flips: bool = True  # horizontal and vertical, half of the images each

    def steps(self, images: int) -> int:
        """Of the whole training. What is left of an epoch after its last full batch is left out."""
        if self.iterations is not None:
            return self.iterations
        return self.epochs * self.steps_per_epoch(images)

    def steps_per_epoch(self, images: int) -> int:
        return max(images // self.batch_size, 1)


class TwoClass(nn.Module, ABC):
    """What both models share: fine-tuning, scoring, files.

    Args:
        backbone: a torchvision ResNet by name.
        weights: "imagenet", "random", or a file: our checkpoint or a torchvision state dict.
        preset: "paper": images are resized to 256 x 256 pixels.
        seed: of new layers, the order of images and their flips, and of random weights.
        device: where the network lives.

    Raises:
        InputError: an unknown name, or weights that cannot be had or do not fit the backbone.
    """

    format: str  # mark of a saved model

    def __init__(
        self,
        backbone: str = "resnet50",
        weights: str | Path = "imagenet",
        preset: str = "paper",
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        super().__init__()
        self.backbone, self.preset, self.seed = backbone, preset, seed
        self.settings = find_preset(preset, PRESETS)
        self.device = pick_device(device)
        self.network = None  # until it is fitted
        self.count = 0  # images fitted
        self.image_size: tuple[int, int] | None = None
        self._start = load_backbone(backbone, weights, seed=seed)

    @abstractmethod
    def new_network(self, backbone: nn.Module) -> nn.Module:
        """The network around a ResNet, whose weights it takes over; new layers are drawn."""

    @abstractmethod
    def truth(self, labels, masks):
        """Which of the two the network learns, of one image or of a batch."""

    @abstractmethod
    def maps_and_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, H, W) and scores (B,), of images on the network's device."""

    def fit(
        self,
        data: Sequence[tuple[Tensor, int, Tensor]],
        training: Training = Training(),
        *,
        workers: int = 4,
        checkpoint: str | Path | None = None,
        progress: bool = False,
        title: str = "fit",
    ) -> "TwoClass":
        """Fine-tune from the pre-trained backbone, all layers, on images of both kinds.

        The loss is the focal loss, as its paper normalises it: by the number of anomalous items,
        here that of the mean batch, so it is the mean over all divided by the anomalous share of
        the training set. Every step is a pure function of the state, the seed and its number, so
        a training that goes on from `checkpoint` ends as one that was never interrupted.

        Args:
            data: data[i] is image (3, H, W) float32 normalised, label 0 or 1, and mask (H, W) bool;
                read by `workers` threads, once per epoch.
            training: the schedule.
            checkpoint: file to go on from if it exists, and to save to now and then.
            progress: show a bar called `title`.

        Raises:
            InputError: no images or only one class, a checkpoint of another training, or a loss
                that is not finite.
        """
        if not len(data):
            raise InputError("there is no image to fit")
        steps = training.steps(len(data))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            network = self.new_network(copy.deepcopy(self._start))
        network = network.to(self.device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=training.lr,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )
        share = self._anomalous_share(data)
        key = asdict(training) | {"steps": steps, "images": len(data), "share": share}
        key |= {"model": self.format, "seed": self.seed, "start": _digest(self._start)}
        step = _resume(checkpoint, key, network, optimizer)
        bar = tqdm(total=steps, initial=step, desc=title, unit="step", disable=not progress)
        batches = self._batches(data, training, range(step, steps), workers)
        with bar:
            for images, labels, masks in batches:
                logits, truth = network(images)[:, 0], self.truth(labels, masks)
                loss = sigmoid_focal_loss(
                    logits, truth, training.alpha, training.gamma, reduction="mean"
                )
                loss = loss / share
                if not math.isfinite(shown := loss.item()):
                    raise InputError(f"the loss of step {step + 1} is {shown}: try a lower lr")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                bar.set_postfix_str(f"loss {shown:.3g}", refresh=False)
                bar.update()
                if checkpoint and step % SAVE_EVERY == 0 and step < steps:
                    _save_training(checkpoint, key, network, optimizer, step)
        self.network = network.eval()
        self.count, self.image_size = len(data), tuple(data[0][0].shape[1:])
        return self

    def _anomalous_share(self, data: Sequence) -> float:
        """Of all images, or pixels, of the training set."""
        truth = [self.truth(label, mask) for _, label, mask in data]
        share = float(np.mean([np.asarray(part).mean() for part in truth]))
        if not 0 < share < 1:
            raise InputError(f"all is {'anomalous' if share else 'normal'}: nothing to tell apart")
        return share

    def _batches(
        self, data: Sequence, training: Training, steps: Iterable[int], workers: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, labels and masks of each step, on the device."""
        size = min(training.batch_size, len(data))

        def places() -> Iterator[tuple[int, bool, bool]]:
            for step in steps:
                epoch, batch = divmod(step, training.steps_per_epoch(len(data)))
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(len(data), generator=generator).tolist()
                flips = torch.rand(len(data), 2, generator=generator) < 0.5 * training.flips
                for place in order[batch * size :][:size]:
                    yield place, *flips[place].tolist()

        def load(what: tuple[int, bool, bool]) -> tuple[Tensor, int, Tensor]:
            place, across, down = what
            image, label, mask = data[place]
            axes = [axis for axis, flipped in ((-1, across), (-2, down)) if flipped]
            return image.flip(axes), label, torch.as_tensor(mask).flip(axes)

        loaded = in_threads(load, places(), workers)
        while batch := list(islice(loaded, size)):
            images, labels, masks = zip(*batch)
            images = torch.stack(images).to(self.device, memory_format=torch.channels_last)
            masks = torch.stack(masks).to(self.device, torch.float32)
            yield images, torch.tensor(labels, dtype=torch.float32, device=self.device), masks

    @torch.inference_mode()
    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, H, W) and scores (B,) of (B, 3, H, W) normalised images: logits, higher is more
        anomalous.

        Raises:
            InputError: the model is not fitted, or the images have another size.
        """
        if self.network is None:
            raise InputError("this model is not fitted: call fit, or load a saved one")
        check_image_size(images, self.image_size, type(self).__name__)
        images = images.to(self.device, torch.float32, memory_format=torch.channels_last)
        return self.maps_and_scores(images)

    def save(self, path: str | Path) -> None:
        """Write the fitted model to one file.

        Raises:
            InputError: it is not fitted, or the disk refuses.
        """
        if self.network is None:
            raise InputError("this model is not fitted: there is nothing to save")
        names = ("backbone", "preset", "seed", "count", "image_size")
        state = {name: getattr(self, name) for name in names}
        state |= {"format": self.format, "version": VERSION, "network": self.network.state_dict()}
        save_state(path, state)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "TwoClass":
        """A model that `save` wrote.

        Raises:
            InputError: the file is missing, damaged, or something else.
        """
        state = read_marked(path, f"a saved {cls.__name__}", cls.format, VERSION)
        names = ("backbone", "preset", "seed")
        model = cls(weights="random", device=device, **{name: state[name] for name in names})
        model.network = model.new_network(new_backbone(state["backbone"]))
        model.network.load_state_dict(state["network"])
        model.network = model.network.to(model.device, memory_format=torch.channels_last).eval()
        model.count, model.image_size = state["count"], tuple(state["image_size"])
        return model


class Classifier(TwoClass):
    """A ResNet with one logit. Its maps are class activation maps (Zhou et al. 2016): what each
    position of the last layer adds to the logit, up to the pooling. They are to be looked at."""

    format = "spd-fast classifier"

    def new_network(self, backbone: nn.Module) -> nn.Module:
        backbone.fc = nn.Linear(backbone.fc.in_features, 1)
        return backbone

    def truth(self, labels, masks):
        return labels

    def maps_and_scores(self, images):
        net = self.network
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        scores = net.fc(x.mean((2, 3)))[:, 0]
        maps = torch.einsum("bchw,c->bhw", x, net.fc.weight[0]) + net.fc.bias
        size = images.shape[2:]
        return F.interpolate(maps[:, None], size, mode="bilinear")[:, 0], scores


class UNet(TwoClass):
    """A U-Net (Ronneberger et al. 2015) with the backbone as its encoder, of the library
    segmentation_models_pytorch. The score of an image is the maximum of its map."""

    format = "spd-fast unet"

    def __init__(self, backbone: str = "resnet50", *arguments, **kwargs):
        known = _segmentation_models().encoders.get_encoder_names()
        if backbone not in known:
            raise InputError(
                f"segmentation_models_pytorch has no encoder {backbone} for the U-Net; it has "
                f"{', '.join(name for name in known if name.startswith('resnet'))}"
            )
        super().__init__(backbone, *arguments, **kwargs)

    def new_network(self, backbone: nn.Module) -> nn.Module:
        network = _segmentation_models().Unet(self.backbone, encoder_weights=None, classes=1)
        network.encoder.load_state_dict(backbone.state_dict())  # it leaves fc out
        return network

    def truth(self, labels, masks):
        return masks

    def maps_and_scores(self, images):
        maps = self.network(images)[:, 0]
        return maps, maps.amax((1, 2))


def _segmentation_models():
    """The library; it takes seconds to import."""
    try:
        import segmentation_models_pytorch
    except ImportError:
        raise InputError("the U-Net needs: pip install 'spd-fast[paper]'") from None
    return segmentation_models_pytorch


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def _save_training(path: str | Path, key: dict, network, optimizer, step: int) -> None:
    state = {"format": TRAINING, "version": TRAINING_VERSION, "key": key, "step": step}
    state |= {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    save_state(path, state)


def _resume(path: str | Path | None, key: dict, network, optimizer) -> int:
    """The step that a training goes on from, 0 without a checkpoint."""
    if path is None or not Path(path).exists():
        return 0
    state = read_marked(path, "a checkpoint of a 2-class training", TRAINING, TRAINING_VERSION)
    if state["key"] != key:
        raise InputError(f"{path} is of a training with other settings or images: delete it")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
