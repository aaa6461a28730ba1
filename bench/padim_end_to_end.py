"""PaDiM from images to maps: ours, anomalib (torch, OpenVINO), AnomaVision, a diagonal covariance.

    pip install openvino anomavision    # left out where they are not installed
    python bench/padim_end_to_end.py [--backbones resnet18] [--threads 2]

All contenders of a backbone have the same random weights, kept channels and Gaussians, and get the
same 256 x 256 images. Each is a process of its own, so that its memory can be told, and every one
runs twice in turn with the others; the shorter time counts. "memory" is the most that the process
occupies while it scores, its imports included. "agrees" is the largest relative difference from
our float32 map; AnomaVision has no Gaussian, so there it is from our map without one.

The whole takes 25 minutes, 18 GB of memory and, for WideResNet-50, 8 GB of disk.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import best, peak_memory

from spd_fast import PaDiM, mahalanobis_map
from spd_fast.models import load_backbone
from spd_fast.ops.backends import native
from spd_fast.ops.factor import converted
from spd_fast.reference import unpack

SIZE, TRAIN, BATCHES = 256, 24, (1, 16)
TOLERANCES = {"float32": 1e-4, "float16": 1e-3, "int8": 1e-2}


def smooth_images(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, 3, SIZE // 8, SIZE // 8, generator=generator)
    return F.interpolate(noise, (SIZE, SIZE), mode="bicubic")


def prepare(backbone: str, work: Path) -> None:
    """Fit ours, and write what the others need: their inverse covariances, and expected maps."""
    model = PaDiM(backbone, preset="anomalib", weights="random")
    model.fit(smooth_images(TRAIN, 0).split(8))
    for dtype in TOLERANCES:
        model.factor_dtype, kept = dtype, model.factor
        model.factor = converted(kept, len(model.channels), getattr(torch, dtype))
        model.save(work / f"{dtype}.pt")
        model.factor = kept
    model.factor_dtype = "float32"
    d, positions = len(model.channels), len(model.mean)
    inverse = np.lib.format.open_memmap(work / "inverse.npy", "w+", np.float32, (positions, d, d))
    for start in range(0, positions, 64):
        w = unpack(model.factor[start : start + 64], d)
        inverse[start : start + 64] = (w.mT @ w).numpy()
    inverse.flush()
    np.save(work / "mean.npy", model.mean.numpy())
    np.save(work / "channels.npy", model.channels.numpy())
    images = smooth_images(max(BATCHES), 1)
    layers = model.features(images)
    distances = mahalanobis_map(layers, model.channels, model.mean, model.factor)
    bilinear = F.interpolate(distances[:, None], (SIZE, SIZE), mode="bilinear")
    np.save(work / "bilinear.npy", bilinear[:, 0])
    np.save(work / "maps.npy", model.score(images)[0])


# ------------------------------------------------- contenders: work -> a function of images to maps


def ours(dtype: str) -> Callable:
    def make(backbone: str, work: Path, threads: int) -> Callable[[torch.Tensor], torch.Tensor]:
        model = PaDiM.load(work / f"{dtype}.pt")
        return lambda images: model.score(images)[0]

    return make


def statistics(work: Path) -> list[torch.Tensor]:
    return [torch.from_numpy(np.load(work / f"{x}.npy")) for x in ("mean", "inverse", "channels")]


def anomalib_model(backbone: str, work: Path):
    from anomalib.models.image.padim.torch_model import PadimModel

    mean, inverse, channels = statistics(work)
    model = PadimModel(backbone, pre_trained=False, n_features=len(channels)).eval()
    network = model.feature_extractor.feature_extractor
    network.load_state_dict(load_backbone(backbone, "random").state_dict(), strict=False)
    model.idx, model.gaussian.mean = channels, mean.T.contiguous()
    model.gaussian.inv_covariance = inverse
    return model


def anomalib(backbone: str, work: Path, threads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    model = anomalib_model(backbone, work)
    return lambda images: model(images).anomaly_map[:, 0]


def diagonal(backbone: str, work: Path, threads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """anomalib's model with a variance per channel instead of the covariance."""
    model = anomalib_model(backbone, work)
    mean = model.gaussian.mean[None]
    weight = model.gaussian.inv_covariance.diagonal(dim1=1, dim2=2).T.contiguous()[None]
    model.gaussian.inv_covariance = torch.empty(0)
    generator = model.anomaly_map_generator

    def maps(images):
        features = model.feature_extractor(images)
        delta = model.generate_embedding(features).flatten(2) - mean
        side = SIZE // 4
        distances = (delta.square() * weight).sum(1).sqrt().view(-1, 1, side, side)
        return generator.smooth_anomaly_map(generator.up_sample(distances, (SIZE, SIZE)))[:, 0]

    return maps


def openvino(backbone: str, work: Path, threads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Converted for one size of batch at a time, as one would deploy it."""
    import openvino as ov

    class Maps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = anomalib_model(backbone, work)

        def forward(self, images):
            return self.model(images).anomaly_map

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    plain = Maps().eval()
    converted = ov.convert_model(plain, example_input=smooth_images(2, 0))
    del plain
    compiled = {}

    def maps(images):
        n = len(images)
        if n not in compiled:
            compiled.clear()
            converted.reshape([n, 3, SIZE, SIZE])
            compiled[n] = ov.compile_model(converted, "CPU", settings)
        return torch.from_numpy(compiled[n](images.numpy())[0])[:, 0]

    return maps


def anomavision(backbone: str, work: Path, threads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    import torchvision
    from anomavision.algorithm.common import feature_extraction
    from anomavision.algorithm.padim.padim_lite import PadimLite

    def new(weights=None, progress=True):  # its own would download ImageNet weights
        network = getattr(torchvision.models, backbone)()
        network.load_state_dict(load_backbone(backbone, "random").state_dict())
        return network

    name = backbone.removesuffix("_2")
    feature_extraction.BACKBONES[name] = (new, None)
    mean, inverse, channels = statistics(work)
    model = PadimLite(name, [0, 1, 2], channels, mean, inverse)
    return lambda images: model.predict(images)[1]


CONTENDERS = {f"spd-fast {dtype}": ours(dtype) for dtype in TOLERANCES} | {
    "anomalib": anomalib,
    "anomalib, OpenVINO": openvino,
    "AnomaVision": anomavision,
    "diagonal": diagonal,
}


# ------------------------------------------------------------------------------------ measurement


@torch.inference_mode()
def contend(name: str, backbone: str, work: Path, threads: int) -> None:
    """In a process of its own: print times, memory and agreement as JSON."""
    torch.set_num_threads(threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))  # an error instead of a dead machine
    images = smooth_images(max(BATCHES), 1)
    expected = torch.from_numpy(
        np.load(work / ("bilinear.npy" if name == "AnomaVision" else "maps.npy"))
    )
    found: dict = {"ms": {}, "memory": 0, "differences": [], "error": ""}
    try:
        maps = CONTENDERS[name](backbone, work, threads)
        for batch in BATCHES:
            exact, result = expected[:batch], maps(images[:batch])
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            found["ms"][batch] = 1e3 * best(lambda n=batch: maps(images[:n]), 3)
            found["memory"] = max(peak_memory(), found["memory"])
            found["differences"].append(((result - exact).abs() / exact).max().item())
    except (RuntimeError, MemoryError) as error:
        found["error"] = " ".join(f"{error}".split())[:100]
    print(json.dumps(found))


def check(name: str, differences: list[float]) -> str:
    if not differences:
        return "-"
    if name == "diagonal":
        return "another model"
    tolerance = TOLERANCES.get(name.removeprefix("spd-fast "), 1e-3)
    difference = np.max(differences)  # NaN if one is
    assert difference < tolerance, f"the map of {name} differs by {difference}"
    return f"{difference:.0e}"


def compare(backbone: str, names: list[str], threads: int, folder: str | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [sys.executable, __file__, "--threads", str(threads), "--work", work]
        subprocess.run([*command, "--prepare", backbone], check=True, capture_output=True)
        runs: dict[str, list[dict]] = {name: [] for name in names}
        for name in 2 * names:
            run = [*command, "--contend", name, backbone]
            output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
            runs[name].append(json.loads(output.splitlines()[-1]))
    first, last = map(str, BATCHES)
    print(f"\n{backbone:<20}{f'ms, batch {first}':>14}{'x ours':>8}", end="")
    print(f"{f'ms, batch {last}':>14}{'x ours':>8}{'images/s':>10}{'memory GB':>11}  agrees")
    own = {batch: shortest(runs["spd-fast float32"], batch) for batch in (first, last)}
    for name in names:
        line = f"{name:<20}"
        for batch in (first, last):
            ms = shortest(runs[name], batch)
            line += f"{ms:>14.1f}{ms / own[batch]:>8.2f}" if ms else f"{'-':>14}{'':>8}"
        line += f"{1e3 * int(last) / ms:>10.1f}" if ms else f"{'':>10}"
        memory = max(run["memory"] for run in runs[name]) / 1e9
        agrees = check(name, [x for run in runs[name] for x in run["differences"]])
        error = max(run["error"] for run in runs[name])
        print(f"{line}{memory:>11.2f}  {agrees}  {error}".rstrip())


def shortest(runs: list[dict], batch: str) -> float | None:
    return min((run["ms"][batch] for run in runs if batch in run["ms"]), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backbones", nargs="+", default=["resnet18", "resnet50", "wide_resnet50_2"]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="contenders, besides spd-fast float32")
    parser.add_argument(
        "--work", help="where there is room for 8 GB; default: the temporary folder"
    )
    parser.add_argument("--prepare", metavar="BACKBONE", help=argparse.SUPPRESS)
    parser.add_argument("--contend", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(options.prepare, Path(options.work))
        return
    if options.contend:
        contend(*options.contend, Path(options.work), options.threads)
        return
    needs = {"anomalib, OpenVINO": "openvino", "AnomaVision": "anomavision"}
    names = [name for name in CONTENDERS if name not in needs or find_spec(needs[name])]
    if options.only:
        names = [name for name in names if name in ("spd-fast float32", *options.only)]
    print(f"{options.threads} threads, {native.build_config()['instruction_set']}", end=", ")
    print(f"torch {torch.__version__}")
    for backbone in options.backbones:
        own = [name for name in names if name != "AnomaVision" or backbone != "resnet50"]
        compare(backbone, own, options.threads, options.work)


if __name__ == "__main__":
    main()
