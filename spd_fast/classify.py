"""The accuracy of a classifier that was trained here: with its backbone, or as a linear probe."""

from pathlib import Path

import torch
from torch import nn

from spd_fast.datasets.shards import open_images
from spd_fast.errors import InputError
from spd_fast.files import read_state
from spd_fast.held_out import labels_among, top_k
from spd_fast.models import CHECKPOINT_FORMAT, new_backbone, pick_device, read_checkpoint
from spd_fast.probe import PROBE_FORMAT, new_head, read_probe

CLASSIFIER_FILE = "a checkpoint of `pretrain --recipe supervised` or of `probe`"


def classify(
    checkpoint: str | Path,
    data: str | Path | list[str | Path],
    size: int | None = None,
    device: str = "auto",
    workers: int = 2,
) -> dict:
    """Top-1 and top-5 accuracy on images in folders by class.

    Args:
        checkpoint: of `pretrain` with the recipe supervised, or of `probe`.
        data: directories, see `open_images`; folders have the names that they had in training.
        size: of the centre that is cut out, pixels; None: that of training.
        device: "auto", "cpu" or "cuda".
        workers: threads that read images.

    Returns:
        "top1", "top5" (see `held_out.top_k`), "images", "classes" (of the classifier) and
        "data_classes" (of them in `data`).

    Raises:
        InputError: the checkpoint has no classifier, `data` a class that the classifier does not
            know, or an image cannot be read.
    """
    device = pick_device(device)
    network, classes, trained_size = load_classifier(checkpoint)
    images = open_images(data)
    labels = labels_among(classes, images, str(checkpoint))
    network.to(device, memory_format=torch.channels_last)
    found = top_k(network, images.paths, labels, size or trained_size, device, workers)
    return found | {
        "images": len(images),
        "classes": len(classes),
        "data_classes": len(images.classes),
    }


def load_classifier(path: str | Path) -> tuple[nn.Module, list[str], int]:
    """A torchvision ResNet with its classifier as fc, in evaluation mode; the names of the classes
    in the order of its outputs; the size of the images that it was trained on.

    Raises:
        InputError: there is no classifier in the file.
    """
    state = read_state(path, CLASSIFIER_FILE)
    kind = state.get("format") if isinstance(state, dict) else None
    if kind == PROBE_FORMAT:
        state = read_probe(path)
    elif kind == CHECKPOINT_FORMAT:
        state = _read_supervised(path)
    else:
        raise InputError(f"{path} is not {CLASSIFIER_FILE}")
    config, classes = state["config"], state["classes"]
    network = new_backbone(config["backbone"])
    width = network.fc.in_features
    network.fc = nn.Identity()
    network.load_state_dict(state["backbone"])
    if kind == PROBE_FORMAT:
        network.fc = new_head(width, len(classes), config["feature_norm"])
        network.fc.load_state_dict(state["head"])
    else:
        network.fc = nn.Linear(width, len(classes))
        parts = {n: state["model"][f"classifier.{n}"] for n in ("weight", "bias")}
        network.fc.load_state_dict(parts)
    return network.eval(), classes, config["size"]


def _read_supervised(path: str | Path) -> dict:
    state = read_checkpoint(path)
    recipe = state["config"]["recipe"]
    if recipe != "supervised":
        raise InputError(
            f"{path} is of the recipe {recipe}, which trains no classifier: train one on its "
            "features with `spd-fast probe --weights`"
        )
    if "classes" not in state:
        raise InputError(
            f"{path} does not hold the names of its classes: it was written by an older spd-fast"
        )
    return state
