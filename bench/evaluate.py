"""One category from JPEG files to a report: `evaluate` beside anomalib's Engine, each in a process
of its own: wall time, CPU time, peak memory.

    python bench/evaluate.py                    # makes 1,100 images of 1500 x 1200 first
    python bench/evaluate.py --data bench_visa  # keeps them there, and finds them the next time

PaDiM, 900 training and 200 test images at 256 x 256 pixels, the same weights and channels. The two
must agree in their AU-ROC of images and pixels. Ours also makes AU-PR, AU-PRO, curves, intervals,
pictures and an HTML page; anomalib's Engine prints its AU-ROC of images and of pixels.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from measure import PeakOfTree, best

CATEGORY = "biscuit"
SIZE = 256


def make_data(root: Path, normal: int, anomalous: int, width: int) -> None:
    from spd_fast.datasets.synthetic import write_synthetic_visa

    if not (root / "visa").exists():
        print("drawing images", flush=True)
        size = (width, width * 4 // 5)
        write_synthetic_visa(root / "visa", 0, size, normal, anomalous, [CATEGORY])


def ours(root: Path, backbone: str, d: int, weights: Path, channels: list[int]) -> dict:
    from spd_fast import padim
    from spd_fast.evaluate import EvaluateConfig, evaluate

    made = padim.PaDiM.__init__

    def same_channels(self, *arguments, **kwargs):
        made(self, *arguments, **kwargs)
        self.channels = torch.tensor(channels)

    padim.PaDiM.__init__ = same_channels
    with tempfile.TemporaryDirectory() as out:
        run = evaluate(
            EvaluateConfig(
                data=str(root / "visa"),
                out=out,
                backbone=backbone,
                weights=str(weights),
                n_features=d,
                preset="anomalib",
                workers=2,
            )
        )
    (category,) = run["categories"]
    return {level: category[level]["au_roc"] for level in ("image", "pixel")}


def anomalib(root: Path, backbone: str, d: int, weights: Path, channels: list[int]) -> dict:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.metrics import AUROC, Evaluator
    from anomalib.models import Padim

    data = root / "visa" / CATEGORY / "Data"
    split = json.loads((root / "split.json").read_text())
    for name, files in split.items():  # Folder takes directories
        (root / name).mkdir(exist_ok=True)
        for file in files:
            if not (root / name / Path(file).name).exists():
                (root / name / Path(file).name).hardlink_to(file)
    module = Folder(
        name=CATEGORY,
        normal_dir=root / "train",
        normal_test_dir=root / "test",
        abnormal_dir=data / "Images" / "Anomaly",
        mask_dir=data / "Masks" / "Anomaly",
        val_split_mode="same_as_test",
        num_workers=2,
    )
    model = Padim(
        backbone=backbone,
        pre_trained=False,
        n_features=d,
        pre_processor=Padim.configure_pre_processor((SIZE, SIZE)),
        # as default a validation finds a range and cuts scores off there, which makes ties
        post_processor=False,
        evaluator=Evaluator(
            test_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
            ]
        ),
        visualizer=False,
    )
    state = torch.load(weights)
    network = model.model.feature_extractor.feature_extractor
    missing = network.load_state_dict(state, strict=False).missing_keys
    assert not missing, missing
    model.model.idx = torch.tensor(channels)
    with tempfile.TemporaryDirectory() as out:
        settings = dict(accelerator="cpu", logger=False, limit_val_batches=0)
        engine = Engine(default_root_dir=out, **settings)
        engine.fit(model, module)
        (found,) = engine.test(model, datamodule=module)
    return {level: found[f"{level}_AUROC"] for level in ("image", "pixel")}


def backbone_seconds(backbone: str, images: int) -> float:
    """What the network alone takes for all images, by us, in batches of 16."""
    from spd_fast.detector import feature_network
    from spd_fast.models import new_backbone

    network, run = feature_network(new_backbone(backbone), torch.device("cpu"))
    x = torch.randn(16, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return best(lambda: run(x), 5.0) / 16 * images


def child(options) -> None:
    """One of the two, in this process."""
    torch.set_num_threads(options.threads)
    task = json.loads(options.child)
    began = time.perf_counter()
    function = {"ours": ours, "anomalib": anomalib}[task.pop("who")]
    with PeakOfTree() as memory:
        found = function(Path(task.pop("root")), weights=Path(task.pop("weights")), **task)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found["wall"] = time.perf_counter() - began
    found["cpu"] = sum(u.ru_utime + u.ru_stime for u in used)
    found["memory"] = memory.bytes
    print("RESULT " + json.dumps(found))


def run_child(options, **task) -> dict | str:
    command = [sys.executable, __file__, "--threads", str(options.threads)]
    command += ["--child", json.dumps(task)]
    most = options.most_memory << 30

    def limit():  # an error of this process instead of the machine's out-of-memory killer
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return (
            f"failed with status {done.returncode}, {options.most_memory} GiB allowed: {last[:200]}"
        )
    return json.loads(lines[0].removeprefix("RESULT "))


def compare(options, root: Path, backbone: str, d: int) -> None:
    import torchvision

    from spd_fast.padim import PaDiM

    torch.manual_seed(0)
    weights = root / f"{backbone}.pt"
    state = torchvision.models.get_model(backbone).state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, weights)
    model = PaDiM(backbone, d, preset="anomalib", weights=weights)
    task = dict(root=str(root), backbone=backbone, d=d, weights=str(weights))
    task["channels"] = model.channels.tolist()
    network = backbone_seconds(backbone, options.normal + options.anomalous)
    print(f"{backbone}, d {d}; the network alone takes {network:.0f} s")
    found = {}
    for who in ("anomalib", "ours"):
        result = found[who] = run_child(options, who=who, **task)
        if isinstance(result, str):
            print(f"  {who:<10}{result}")
            continue
        print(
            f"  {who:<10}{result['wall']:>8.0f}{result['cpu']:>8.0f}"
            f"{result['memory'] / 2**30:>8.2f}{network / result['wall']:>10.0%}"
            f"{100 * result['image']:>10.2f}{100 * result['pixel']:>8.2f}",
            flush=True,
        )
    if all(isinstance(result, dict) for result in found.values()):
        a, b = found["anomalib"], found["ours"]
        for level in ("image", "pixel"):
            assert abs(a[level] - b[level]) < 0.005, f"{level} AU-ROC differs"
        ratios = [a[name] / b[name] for name in ("wall", "cpu", "memory")]
        print("  ratio     " + "".join(f"{ratio:>8.1f}" for ratio in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="directory to keep the images in")
    parser.add_argument("--normal", type=int, default=1000, help="nine tenths are for training")
    parser.add_argument("--anomalous", type=int, default=100)
    parser.add_argument("--width", type=int, default=1500, help="of the images, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["resnet18:100", "resnet50:100", "resnet50:550"],
        help="backbone and number of channels",
    )
    parser.add_argument("--most-memory", type=int, default=20, help="GiB, of either process")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.data or Path(temporary)
        make_data(root, options.normal, options.anomalous, options.width)
        from spd_fast.datasets import read_dataset

        (category,) = read_dataset(root / "visa")
        split = {"train": category.train, "test": [s for s in category.test if not s.label]}
        names = {name: [str(s.image.resolve()) for s in part] for name, part in split.items()}
        (root / "split.json").write_text(json.dumps(names))
        print(
            f"{len(category.train)} training and {len(category.test)} test images, "
            f"{options.threads} threads"
        )
        print(
            f"  {'':<10}{'wall s':>8}{'CPU s':>8}{'GiB':>8}{'network':>10}{'image':>10}{'pixel':>8}"
        )
        for model in options.models:
            backbone, d = model.split(":")
            compare(options, root, backbone, int(d))


if __name__ == "__main__":
    main()
