"""How fast SimSiam trains, loader included, beside lightly's; and what a step's time goes into.

    python bench/pretrain.py [--sizes 64 96] [--batch 32] [--steps 12] [--rounds 3] [--threads 2]

All train a ResNet-18 on the same photographs (JPEG, 500 x 375) with the same batch, optimizer and
number of threads or processes that read. lightly's is the loop of its documentation, over its own
`SimSiamTransform`, heads and loss. Ours is `spd_fast.pretrain.pretrain` itself, with its logs. What
it does at the end of an epoch, checkpoint and page, is told apart: epochs are of 8 steps only here.

Checked first: with our weights and our views lightly's modules give the loss that our run wrote.
Contenders take turns, and steps that fill the queues do not count. "of peak" is the network's
flops, counted by torch, of those of torch's matrix product, measured before and after each turn:
the machine's speed may change. "ratio" is images / s beside lightly's at the same speed of the
machine. All are medians over rounds.
"""

import argparse
import json
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median

import measure
import torch
import torchvision
from augment_views import jpegs
from lightly.data import LightlyDataset
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.transforms import SimSiamTransform
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spd_fast import recipes
from spd_fast.loader import ViewLoader
from spd_fast.methods import SimSiam
from spd_fast.pretrain import pretrain
from spd_fast.pretrain_config import PretrainConfig
from spd_fast.step_times import PARTS, StepTimes

BACKBONE, DIM, HIDDEN, WORKERS, SEED = "resnet18", 2048, 512, 2, 0
EPOCH = 8  # steps
FILLING = 4  # steps at the start that are not counted
OURS = {  # views, settings
    "ours, SimSiam": (2, {"spd": False}),
    "ours, SimSiam + SPD": (4, {}),
    "the same, views in one pass": (4, {"shared_forward": True}),
}


class LightlySimSiam(nn.Module):
    """The model of lightly's documentation, with the official widths."""

    def __init__(self):
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        self.backbone.fc = nn.Identity()
        self.projector = SimSiamProjectionHead(512, 512, DIM)
        self.predictor = SimSiamPredictionHead(DIM, HIDDEN, DIM)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x, x_hat):
        z, z_hat = (self.projector(self.backbone(v)) for v in (x, x_hat))
        p, p_hat = self.predictor(z), self.predictor(z_hat)
        return (self.criterion(p, z_hat.detach()) + self.criterion(p_hat, z.detach())) / 2


# ------------------------------------------------------------------------------- contenders


def lightly_loader(folder: Path, size: int, batch: int) -> torch.utils.data.DataLoader:
    data = LightlyDataset(str(folder), transform=SimSiamTransform(input_size=size))
    return torch.utils.data.DataLoader(
        data, batch, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True
    )


def lightly_steps(folder: Path, size: int, batch: int, steps: int, channels_last: bool) -> dict:
    """Seconds of the parts of a step, by name, and images / s."""
    loader = lightly_loader(folder, size, batch)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = LightlySimSiam().to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.05 * batch / 256, 0.9, weight_decay=1e-4)
    times, seen = StepTimes(torch.device("cpu")), []
    batches = endless(loader)
    for _ in range(steps):
        times.mark("other")
        views = [view.contiguous(memory_format=memory_format) for view in next(batches)[0]]
        times.mark("data")
        optimizer.zero_grad()
        loss = model(*views)
        times.mark("forward")
        loss.backward()
        times.mark("backward")
        optimizer.step()
        times.mark("optimizer")
        seen.append(times.seconds_of(times.take()))
    batches.close()
    return summary(seen, batch)


def our_steps(folder: Path, size: int, batch: int, steps: int, **settings) -> dict:
    """As `lightly_steps`; and "epoch_end", the seconds of the checkpoint and the run's page."""
    with tempfile.TemporaryDirectory() as out:
        lines = our_run(folder, Path(out), size, batch, steps, **settings)
    seen = [{part: line[f"{part}_s"] for part in PARTS} for line in lines]
    usual = median(step["other"] for step in seen)
    ends = []
    for before, after, step in zip(lines, lines[1:], seen[1:]):
        if after["epoch"] > before["epoch"]:
            ends.append(step["other"] - usual)
            step["other"] = usual
    return summary(seen, batch) | {"epoch_end": median(ends)}


def our_run(folder: Path, out: Path, size: int, batch: int, steps: int, **settings) -> list[dict]:
    """What a run writes of its steps."""
    config = PretrainConfig(
        [folder], out, backbone=BACKBONE, size=size, batch_size=batch, epochs=steps,
        max_steps=steps, dim=DIM, predictor_dim=HIDDEN, workers=WORKERS, seed=SEED, **settings,
    )  # fmt: skip
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert pretrain(config) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary(steps: list[dict], batch: int) -> dict:
    steps = steps[FILLING:]
    seconds = {part: sum(step[part] for step in steps) / len(steps) for part in PARTS}
    return seconds | {"images_per_s": batch / sum(seconds.values())}


def loader_rate(loader, batch: int, batches: int = 48) -> float:
    """images / s of a loader that has nothing to wait for."""
    some = endless(loader)
    for _ in range(FILLING):
        next(some)
    start = time.perf_counter()
    for _ in range(batches):
        next(some)
    rate = batches * batch / (time.perf_counter() - start)
    some.close()
    return rate


def endless(loader):
    while True:
        yield from loader


# --------------------------------------------------------------------------------- the table


def check(folder: Path, batch: int) -> float:
    """Difference between the first loss that we write and lightly's, of the same weights."""
    with tempfile.TemporaryDirectory() as out:
        ours = our_run(folder, Path(out), 64, batch, 1, spd=False)[0]["loss"]
    torch.manual_seed(SEED)
    method, model = SimSiam(BACKBONE, DIM, HIDDEN), LightlySimSiam()
    model.backbone.load_state_dict(method.backbone.state_dict())
    model.projector.layers.load_state_dict(method.projector.state_dict())
    model.predictor.layers.load_state_dict(method.predictor.state_dict())
    loader = ViewLoader([folder], recipes.simsiam(spd=False), batch, size=64, seed=SEED)
    views = next(iter(loader)).views
    difference = abs(model(*views).item() - ours)
    assert difference < 1e-4, f"the losses differ by {difference}"
    return difference


def flops_per_image(size: int, views: int) -> float:
    """Of forward and backward."""
    model = SimSiam(BACKBONE, DIM, HIDDEN)
    x = torch.randn(views, 2, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(x, torch.zeros(2, dtype=torch.long), 0.1)["loss"].backward()
    return counter.get_total_flops() / 2


def table(folder: Path, size: int, options: argparse.Namespace) -> None:
    shared = folder, size, options.batch, options.steps
    jobs = {
        "lightly, SimSiam": (2, lambda: lightly_steps(*shared, channels_last=False)),
        "the same, channels-last": (2, lambda: lightly_steps(*shared, channels_last=True)),
    }
    for name, (views, given) in OURS.items():
        jobs[name] = views, lambda given=given: our_steps(*shared, **given)
    flops = {views: flops_per_image(size, views) for views in (2, 4)}
    turns: dict[str, list[dict]] = {name: [] for name in jobs}
    for _ in range(options.rounds):
        for name, (views, job) in jobs.items():
            before = measure.multiply_add_peak()
            row = job()
            peak = (before + measure.multiply_add_peak()) / 2
            turns[name].append(row | {"of_peak": flops[views] * row["images_per_s"] / peak})
    rows = {
        name: {key: median(row[key] for row in rows) for key in rows[0]}
        for name, rows in turns.items()
    }
    base = rows["lightly, SimSiam"]["of_peak"] / flops[2]
    print(f"\n{f'{size} x {size}':<30}{'images/s':>9}{'ratio':>7}{'of peak':>9}", end="")
    print("".join(f"{part:>10}" for part in PARTS) + f"{'epoch end s':>13}")
    for name, row in rows.items():
        ratio = row["of_peak"] / flops[jobs[name][0]] / base
        print(f"{name:<30}{row['images_per_s']:>9.1f}{ratio:>7.2f}{row['of_peak']:>9.0%}", end="")
        step = sum(row[part] for part in PARTS)
        shares = "".join(f"{row[part] / step:>10.1%}" for part in PARTS)
        print(shares + (f"{row['epoch_end']:>13.2f}" if "epoch_end" in row else ""))


def table_of_loaders(folder: Path, sizes: list[int], batch: int) -> None:
    print(f"\n{'loader alone, images/s':<30}{'lightly':>9}{'ours':>9}{'ratio':>7}{'4 views':>9}")
    for size in sizes:
        theirs = loader_rate(lightly_loader(folder, size, batch), batch)
        two, four = (
            loader_rate(
                ViewLoader([folder], recipes.simsiam(spd=spd), batch, size=size, workers=WORKERS),
                batch,
            )
            for spd in (False, True)
        )
        name = f"{size} x {size}, 2 views"
        print(f"{name:<30}{theirs:>9.0f}{two:>9.0f}{two / theirs:>7.1f}{four:>9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96], help="of the views")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.steps <= EPOCH:
        parser.error(f"--steps must be more than {EPOCH}, an epoch")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "images"
        folder.mkdir()
        for number, file in enumerate(jpegs(EPOCH * options.batch)):
            (folder / f"{number:04d}.jpg").write_bytes(file.numpy().tobytes())
        difference = check(folder, options.batch)
        print(
            f"{BACKBONE}, batch {options.batch}, {options.threads} threads, {WORKERS} that read, "
            f"multiply-add {measure.multiply_add_peak() / 1e9:.0f} GFLOP/s; "
            f"first losses differ by {difference:.0e}"
        )
        table_of_loaders(folder, options.sizes, options.batch)
        for size in options.sizes:
            table(folder, size, options)


if __name__ == "__main__":
    main()
