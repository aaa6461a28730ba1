"""What a pre-training run writes of every step: metrics.jsonl, TensorBoard, the progress line."""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from spd_fast.errors import InputError
from spd_fast.files import write_text
from spd_fast.loader import Batch, ViewLoader


class StepLog:
    """The numbers of every step: metrics.jsonl, TensorBoard and the progress line.

    A step is written while the next one is computed: a GPU would have to wait if its loss were read
    at once. On starting from a checkpoint, what was written after that is dropped.
    """

    def __init__(self, out: Path, step: int, steps: int, loader: ViewLoader):
        self.loader, self.pending = loader, None
        self.path = out / "metrics.jsonl"
        self._drop_lines_after(step)
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)
        self.tensorboard = _tensorboard(out / "tensorboard", step)
        self.progress = tqdm(
            total=steps * loader.batch_size,
            initial=step * loader.batch_size,
            desc="pretrain",
            unit="image",
            mininterval=0.5,
        )
        self.started = self.last = time.perf_counter()
        self.last_wait = self.loader.wait_seconds

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *error) -> None:
        self.progress.close()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()

    def add(self, step: int, batch: Batch, losses: dict[str, Tensor], lr: float) -> None:
        self.flush()
        now, wait = time.perf_counter(), self.loader.wait_seconds
        values = torch.stack([loss.detach() for loss in losses.values()])
        speed = {
            "lr": lr,
            "images_per_s": self.loader.batch_size / (now - self.last),
            "wait_share": (wait - self.last_wait) / (now - self.last),
        }
        self.pending = step, list(losses), values, speed, batch.indices
        self.last, self.last_wait = now, wait

    def flush(self) -> None:
        """Write the step that is waiting.

        Raises:
            InputError: its loss is not finite.
        """
        if self.pending is None:
            return
        step, names, values, speed, indices = self.pending
        self.pending = None
        numbers = dict(zip(names, values.tolist()))
        if not math.isfinite(numbers["loss"]):
            raise InputError(
                f"the loss of step {step} is {numbers['loss']}, on the images {indices.tolist()}: "
                f"a lower learning rate may help; the last checkpoint is kept"
            )
        numbers |= speed
        epoch = (step - 1) // len(self.loader)
        self.file.write(json.dumps({"step": step, "epoch": epoch, **numbers}) + "\n")
        if self.tensorboard:
            for name, number in numbers.items():
                self.tensorboard.add_scalar(name, number, step)
        waiting = self.loader.wait_seconds / (time.perf_counter() - self.started)
        self.progress.set_postfix_str(
            f"loss {numbers['loss']:.4f}, waiting for data {waiting:.0%}", refresh=False
        )
        self.progress.update(self.loader.batch_size)

    def _drop_lines_after(self, step: int) -> None:
        kept = []
        if step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    number = json.loads(line)["step"]
                except ValueError:  # cut off when the machine went down
                    continue
                if number <= step:
                    kept.append(line + "\n")
        write_text(self.path, "".join(kept))


def _tensorboard(path: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tqdm.write("tensorboard is not installed: the curves are in metrics.jsonl only")
        return None
    return SummaryWriter(path, purge_step=step + 1)
