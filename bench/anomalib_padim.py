"""anomalib's PaDiM as it is and as `spd_fast.integrations.anomalib.accelerate` returns it.

    python bench/anomalib_padim.py    # needs 8 GB of memory for WideResNet-50-2 with 550 channels

Random weights, 256 x 256 pixels. Checks first that maps and scores agree, then times the two models
in turn: whole, and beyond the backbone (given its features).
"""

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from anomalib.models.image.padim.torch_model import PadimModel

from spd_fast.integrations.anomalib import FastPadimModel, accelerate
from spd_fast.ops.backends import native

SIZE = 256
TRAIN = 24  # images that the Gaussians are fitted to


class Given(torch.nn.Module):
    """In place of a backbone: features made before."""

    def __init__(self, features: dict):
        super().__init__()
        self.features = features

    def forward(self, images):
        return self.features


def smooth_images(n: int) -> torch.Tensor:
    noise = torch.randn(n, 3, SIZE // 8, SIZE // 8)
    return F.interpolate(noise, (SIZE, SIZE), mode="bicubic")


def both_models(backbone: str, d: int) -> tuple[PadimModel, FastPadimModel]:
    """The same fitted model twice; fitted by us, since anomalib's fit takes 20 GB at d = 550."""
    torch.manual_seed(0)
    plain = PadimModel(backbone, pre_trained=False, n_features=d)
    fast = FastPadimModel(copy.deepcopy(plain))  # it changes the layout of the weights
    for images in smooth_images(TRAIN).split(8):
        fast.update(images)
    fast.fit()
    state = accelerate(fast).state_dict()
    # not load_state_dict, which would hold the inverse covariances twice
    plain.gaussian.mean = state["gaussian.mean"]
    plain.gaussian.inv_covariance = state["gaussian.inv_covariance"]
    return plain.eval(), fast.eval()


def times_in_turn(jobs: dict, seconds: float) -> dict[str, float]:
    """Shortest time of each job in milliseconds, over at least 5 rounds of all."""
    best = dict.fromkeys(jobs, float("inf"))
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - start < seconds:
        rounds += 1
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
    return best


def difference(ours, theirs) -> float:
    pairs = ((ours.anomaly_map, theirs.anomaly_map), (ours.pred_score, theirs.pred_score))
    return max(((a - b).abs() / b).max().item() for a, b in pairs)


@torch.inference_mode()
def compare(backbone: str, d: int, batches: list[int], seconds: float) -> None:
    plain, fast = both_models(backbone, d)
    inverse = plain.gaussian.inv_covariance.nbytes / 2**30
    exact = fast.factor
    networks = [(model, model.feature_extractor) for model in (plain, fast)]
    for dtype, tolerance in (("float32", 1e-3), ("float16", 3e-3), ("int8", 1e-2)):
        fast.factor, fast.factor_dtype = exact, "float32"
        accelerate(fast, dtype)
        print(
            f"{backbone}, d {d}, factor {dtype}: {fast.factor.nbytes / 2**30:.2f} GiB for the "
            f"factor, {inverse:.2f} for anomalib's inverse"
        )
        for batch in batches:
            images = smooth_images(batch)
            expected = plain(images)
            error = difference(fast(images), expected)
            assert error < tolerance, f"maps or scores differ by {error}"
            whole = times_in_turn(
                {"theirs": lambda: plain(images), "ours": lambda: fast(images)},  # noqa: B023
                seconds,
            )
            for model, network in networks:
                model.feature_extractor = Given(network(images))
            beyond = times_in_turn(
                {"theirs": lambda: plain(images), "ours": lambda: fast(images)},  # noqa: B023
                seconds,
            )
            for model, network in networks:
                model.feature_extractor = network
            line = f"  batch {batch:<3}"
            for times in (whole, beyond):
                ratio = times["theirs"] / times["ours"]
                line += f"{times['theirs']:>12.1f}{times['ours']:>9.1f}{ratio:>7.1f}"
            print(f"{line}{error:>12.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3, help="for each pair of times")
    parser.add_argument("--small", action="store_true", help="ResNet-18 only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, {native.build_config()['instruction_set']}")
    print(f"{'':<15}{'whole model, ms':>18}{'beyond the backbone, ms':>31}{'largest':>13}")
    print(
        f"{'':<11}{'anomalib':>12}{'ours':>9}{'ratio':>7}" + f"{'anomalib':>12}{'ours':>9}"
        f"{'ratio':>7}{'difference':>12}"
    )
    compare("resnet18", 100, options.batches, options.seconds)
    if not options.small:
        compare("wide_resnet50_2", 550, options.batches, options.seconds)


if __name__ == "__main__":
    main()
