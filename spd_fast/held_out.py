"""What a network makes of images that it did not train on, in folders by class."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from spd_fast.datasets.images import read_image
from spd_fast.datasets.shards import Images
from spd_fast.errors import InputError
from spd_fast.preprocess import Preset, prepare_image
from spd_fast.threads import in_threads

BATCH = 64


def labels_among(classes: Sequence[str], data: Images, what: str) -> list[int]:
    """Position in `classes` of the class of each image of `data`, by its name.

    Raises:
        InputError: `data` has a class that is none of them; the message starts with `what`.
    """
    number = {name: k for k, name in enumerate(classes)}
    unknown = [name for name in data.classes if name not in number]
    if unknown:
        raise InputError(
            f"{what}: the class {unknown[0]} is not one of the training data's "
            f"{len(classes)}, such as {classes[0]}"
        )
    return [number[data.classes[label]] for label in data.labels]


@torch.no_grad()
def outputs(
    network: nn.Module, paths: Sequence[Path], size: int, device: torch.device, workers: int
) -> Iterator[Tensor]:
    """network(images) of the images in order, batch after batch; its mode is the caller's.

    Images are prepared as torchvision evaluates its ResNets: the shorter side becomes 8 / 7 of
    `size` (256 for 224), bilinear, and the centre of `size` is cut out.

    Raises:
        InputError: an image cannot be read.
    """
    preset = Preset(size * 8 // 7, size, Image.Resampling.BILINEAR, border="")
    images = in_threads(lambda path: prepare_image(read_image(path), preset), paths, workers)
    for i in range(0, len(paths), BATCH):
        batch = torch.stack([next(images) for _ in paths[i : i + BATCH]])
        yield network(batch.to(device, memory_format=torch.channels_last))


def top_k(
    network: nn.Module,
    paths: Sequence[Path],
    labels: Sequence[int],
    size: int,
    device: torch.device,
    workers: int,
) -> dict[str, float]:
    """Share of images whose class has the highest output, and is among the five highest.

    Args:
        network: gives (N, classes), with batch norm's running statistics if it is in that mode.
        paths: images, and `labels` their classes, 0 to classes - 1.
        size, device, workers: as for `outputs`.

    Returns:
        "top1" and "top5", 0 to 1; no "top5" of up to five classes, where it is always 1.

    Raises:
        InputError: an image cannot be read, or an output is not finite.
    """
    first = any_of_five = done = classes = 0
    with tqdm(total=len(paths), desc="classify", unit="image", leave=False) as progress:
        for logits in outputs(network, paths, size, device, workers):
            if not bool(logits.isfinite().all()):
                raise InputError("the outputs of the network are not finite")
            wanted = torch.tensor(labels[done : done + len(logits)], device=logits.device)
            classes = logits.shape[1]
            right = logits.topk(min(5, classes)).indices == wanted[:, None]
            first += int(right[:, 0].sum())
            any_of_five += int(right.any(1).sum())
            done += len(logits)
            progress.update(len(logits))
    found = {"top1": first / done}
    return found | {"top5": any_of_five / done} if classes > 5 else found


def format_top_k(result: dict) -> str:
    """For people: what `top_k` found, of "images" of "classes" and, of fewer, "data_classes"."""
    top5 = f"top-5 {result['top5']:.2%}" if "top5" in result else "no top-5: at most 5 classes"
    of = f"{result['classes']} classes"
    if result["data_classes"] < result["classes"]:
        of = f"{result['data_classes']} of the {of}"
    return f"top-1 {result['top1']:.2%}, {top5} ({result['images']} images of {of})"
