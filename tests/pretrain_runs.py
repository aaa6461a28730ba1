"""What the tests of pre-training share: small images, configurations, what a run has written."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from spd_fast import pretrain as module
from spd_fast.pretrain_config import PretrainConfig

LOSSES = ("step", "epoch", "loss", "loss_ssl", "loss_spd", "z_std", "lr")


def write_images(root: Path) -> Path:
    """24 small images of noise, of several sizes before they were resized."""
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 256, (rng.integers(4, 9), rng.integers(4, 9), 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((48, 40), Image.BICUBIC)
        image.save(root / f"{i:02d}.jpg")
    return root


def coloured(root: Path, seed: int, classes=("blue", "green", "red")) -> Path:
    """12 images a class, whose mean colour tells it."""
    rng = np.random.default_rng(seed)
    for channel, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 120, (40, 48, 3))
            pixels[..., 2 - channel] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:02d}.png")
    return root


def config(data, out, **kwargs) -> PretrainConfig:
    """3 steps per epoch."""
    tiny = {"backbone": "resnet18", "size": 32, "batch_size": 8, "epochs": 3, "seed": 7}
    heads = {"dim": 64, "predictor_dim": 16} if kwargs.get("recipe", "simsiam") == "simsiam" else {}
    return PretrainConfig([str(data)], str(out), **tiny | heads | kwargs)


def trace(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{n: line[n] for n in LOSSES if n in line} for line in lines if "loss" in line]


def signal_at(step: int, number: int, monkeypatch) -> None:
    """The process sends itself a signal in the middle of a step."""
    train_step, calls = module.train_step, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return train_step(*args)

    monkeypatch.setattr(module, "train_step", signalled)
