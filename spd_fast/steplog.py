"""What a pre-training run writes of every step: metrics.jsonl, TensorBoard, the progress line."""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from spd_fast.distributed import mean_over_ranks, rank, world_size
from spd_fast.errors import InputError
from spd_fast.files import save_state, write_text
from spd_fast.loader import Batch, ViewLoader
from spd_fast.step_times import StepTimes


class StepLog:
    """The numbers of every step: metrics.jsonl, TensorBoard and the progress line.

    A step is written while the next one is computed: a GPU would have to wait if its loss were read
    at once. On starting from a checkpoint, what was written after that is dropped. Losses are means
    over all processes, of which the first writes.
    """

    def __init__(self, out: Path, step: int, steps: int, loader: ViewLoader):
        self.out, self.loader, self.pending = out, loader, None
        self.writes = not rank()
        self.path = out / "metrics.jsonl"
        self.losses: list[float] = []  # of this epoch
        self.file = self.tensorboard = None
        if self.writes:
            self._drop_lines_after(step)
            self.file = open(self.path, "a", encoding="utf-8", buffering=1)
            self.tensorboard = _tensorboard(out / "tensorboard", step)
        self.batch_size = loader.batch_size * world_size()
        self.progress = tqdm(
            total=steps * self.batch_size,
            initial=step * self.batch_size,
            desc="pretrain",
            unit="image",
            mininterval=0.5,
            disable=not self.writes,
        )
        self.started = time.perf_counter()
        self.times = StepTimes(loader.device)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *error) -> None:
        self.progress.close()
        for file in (self.file, self.tensorboard):
            if file:
                file.close()

    def add(self, step: int, batch: Batch, losses: dict[str, Tensor], lr: float) -> None:
        """Note a step; `losses` are this process's, of one dtype. Its time ends here."""
        self.flush()
        own = torch.stack(list(losses.values()))
        values = mean_over_ranks(own)
        self.times.mark("other")
        batch = batch.indices, batch.params
        self.pending = step, list(losses), values, lr, self.times.take(), own, batch

    def flush(self) -> None:
        """Write the step that is waiting.

        Raises:
            InputError: its loss is not finite; out/not_finite_RANK.pt tells of the batch.
        """
        if self.pending is None:
            return
        step, names, values, lr, marks, own, batch = self.pending
        self.pending = None
        numbers = dict(zip(names, values.tolist()))
        epoch = (step - 1) // len(self.loader)
        if not math.isfinite(numbers["loss"]):
            self._refuse(step, epoch, dict(zip(names, own.tolist())), *batch)
        if (step - 1) % len(self.loader) == 0:
            self.losses = []
        self.losses.append(numbers["loss"])
        if not self.writes:
            return
        seconds = self.times.seconds_of(marks)
        numbers |= {"lr": lr, "images_per_s": self.batch_size / sum(seconds.values())}
        numbers |= {f"{part}_s": took for part, took in seconds.items()}
        self.file.write(json.dumps({"step": step, "epoch": epoch, **numbers}) + "\n")
        self._to_tensorboard(step, numbers)
        waiting = self.loader.wait_seconds / (time.perf_counter() - self.started)
        self.progress.set_postfix_str(
            f"loss {numbers['loss']:.4f}, waiting for data {waiting:.0%}", refresh=False
        )
        self.progress.update(self.batch_size)

    def _refuse(self, step: int, epoch: int, losses: dict, indices: Tensor, params: Tensor) -> None:
        if math.isfinite(losses["loss"]):
            raise InputError(f"the loss of step {step} is not finite on another process")
        path = self.out / f"not_finite_{rank()}.pt"
        paths = [str(self.loader.data.paths[i]) for i in indices]
        batch = {"indices": indices, "paths": paths, "params": params}
        save_state(path, {"step": step, "epoch": epoch, "losses": losses} | batch)
        raise InputError(
            f"the loss of step {step} is {losses['loss']}, on the images {indices.tolist()}: a "
            f"lower learning rate may help; the last checkpoint is kept, and {path} holds the "
            f"images' paths and the parameters of their views"
        )

    def note(self, step: int, numbers: dict[str, float]) -> None:
        """What is known only after the step, on a line of its own."""
        epoch = (step - 1) // len(self.loader)
        self.file.write(json.dumps({"step": step, "epoch": epoch, **numbers}) + "\n")
        self._to_tensorboard(step, numbers)

    def _to_tensorboard(self, step: int, numbers: dict[str, float]) -> None:
        if self.tensorboard:
            for name, number in numbers.items():
                self.tensorboard.add_scalar(name, number, step)

    def epoch_loss(self) -> float:
        """The mean of the epoch so far."""
        return sum(self.losses) / len(self.losses)

    def _drop_lines_after(self, step: int) -> None:
        kept = []
        if step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    numbers = json.loads(line)
                except ValueError:  # cut off when the machine went down
                    continue
                if numbers["step"] <= step:
                    kept.append(line + "\n")
                    if "loss" in numbers and numbers["epoch"] == step // len(self.loader):
                        self.losses.append(numbers["loss"])
        write_text(self.path, "".join(kept))


def _tensorboard(path: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tqdm.write("tensorboard is not installed: the curves are in metrics.jsonl only")
        return None
    return SummaryWriter(path, purge_step=step + 1)
