"""CPU time of the four views of an image: spd-fast, torchvision, and decoding the JPEG.

    python bench/augment_views.py [--images 24] [--rounds 3]

Checks first that both make the same views, then times decode, ours and torchvision in turn on one
thread, image by image, and prints CPU-ms per image with the ratio to the decode.
"""

import argparse
import io
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torchvision.io import decode_jpeg

from spd_fast import augment_views, recipes, sample_view_params
from spd_fast.ops.backends import native

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from peers import torchvision_views  # noqa: E402

SIZE = (375, 500)


def jpegs(n: int) -> list[bytes]:
    """n JPEGs of about 500 x 375, cut from photographs that come with scikit-image."""
    from skimage import data

    rng = np.random.default_rng(0)
    photos = [data.astronaut(), data.coffee(), data.rocket(), data.chelsea()]
    files = []
    for i in range(n):
        photo = Image.fromarray(photos[i % len(photos)])
        top, left = rng.integers(0, 40, 2)
        cut = photo.crop((left, top, photo.width - 20, photo.height - 20)).resize(SIZE[::-1])
        file = io.BytesIO()
        cut.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = [torch.frombuffer(bytearray(f), dtype=torch.uint8) for f in jpegs(options.images)]
    decoded = [decode_jpeg(f).permute(1, 2, 0).contiguous() for f in files]
    params = sample_view_params(recipes.simsiam(), [SIZE] * len(files), range(len(files)), 0, 0)
    unit = dict(mean=(0, 0, 0), std=(1, 1, 1))

    worst = 0.0
    for i, image in enumerate(decoded[:4]):
        ours = augment_views([image], params[i : i + 1], **unit, backend="native")[:, 0]
        theirs = torch.stack(torchvision_views(image, params[i], (224, 224)))
        worst = max(worst, (ours - theirs).abs().max().item())
    assert worst < 1e-4, f"the views differ by {worst}"
    print(f"same views: largest difference {worst:.1e} on [0, 1]")

    jobs = {
        "decode_jpeg (libjpeg-turbo)": lambda i: decode_jpeg(files[i]),
        "spd-fast, 4 views": lambda i: augment_views([decoded[i]], params[i : i + 1], threads=1),
        "torchvision v2, 4 views": lambda i: torchvision_views(
            decoded[i], params[i], (224, 224), torch.float32, separable_alpha=True
        ),
    }
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(options.rounds):
        for i in range(len(files)):
            for name, job in jobs.items():
                start = time.process_time()
                job(i)
                spent[name].append(1e3 * (time.process_time() - start))
    unit_time = median(spent["decode_jpeg (libjpeg-turbo)"])
    print(f"instruction set {native.build_config()['instruction_set']}, one thread")
    print(f"{'':<30}{'CPU-ms / image':>15}{'/ decode':>10}")
    for name, times in spent.items():
        print(f"{name:<30}{median(times):>15.2f}{median(times) / unit_time:>10.2f}")


if __name__ == "__main__":
    main()
