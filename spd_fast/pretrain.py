"""Pre-training with the SPot-the-Difference regulariser (paper section 3.3)."""

import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from spd_fast import recipes
from spd_fast.checkpoints import Run, find_checkpoint, keep_checkpoint, restore, save_checkpoint
from spd_fast.datasets import read_dataset
from spd_fast.distributed import (
    averaged,
    barrier,
    highest,
    of_all_ranks,
    process_group,
    rank,
    sync_batch_norms,
    world_size,
)
from spd_fast.errors import InputError
from spd_fast.files import make_output_dir, write_json
from spd_fast.info import versions
from spd_fast.knn import KnnMonitor
from spd_fast.loader import Batch, ViewLoader
from spd_fast.methods import Method, MoCo, SimCLR, SimSiam, Supervised
from spd_fast.models import check_can_compile, load_backbone, pick_device
from spd_fast.optim import new_optimizer
from spd_fast.pretrain_config import (
    METHOD_SETTINGS,
    PretrainConfig,
    part_size,
    resolved,
    write_config,
)
from spd_fast.run_page import write_run_page
from spd_fast.steplog import StepLog

METHODS = {"simsiam": SimSiam, "moco": MoCo, "simclr": SimCLR, "supervised": Supervised}
SAVED = 75  # sysexits.h: a temporary failure, try again


def pretrain(config: PretrainConfig) -> int:
    """Pre-train a backbone; what `spd_fast.models.load_backbone` reads is `out/last.pt`.

    Writes into `config.out`: last.pt after every epoch, at the end, and on SIGINT, SIGTERM or
    SIGUSR1; best.pt, of the epoch of the lowest mean loss or, with `config.knn`, of the highest
    accuracy, and epoch_*.pt of the last `config.keep`; metrics.jsonl, one line per step, and
    run.html, its curves and example views; tensorboard/, if that is installed; config.yaml, from
    which `spd-fast pretrain --config` repeats the run, and run.json: device, steps, versions. A
    run that goes on from a checkpoint ends on a CPU with the same bits as one that was never
    interrupted, given the same number of torch threads.

    Under `torchrun` (DistributedDataParallel) each process has its share of every batch, and the
    first one writes. Together they see the views that one process sees; the losses are the same, to
    rounding, if batch norm is synchronised, and MoCo's, if its groups can be shared equally.

    Returns:
        0; SAVED (75) if SIGTERM or SIGUSR1 ended the run early, 130 if SIGINT did: the step was
        finished and saved.

    Raises:
        InputError: bad configuration or data; a checkpoint of another run; a loss that is not
            finite (the last checkpoint stays, and not_finite_*.pt tells of the batch); `out`
            cannot be written.
    """
    config = resolved(config)
    with process_group(pick_device(config.device)) as device:
        checkpoint = find_checkpoint(config)
        barrier()  # all have looked before one writes
        run = _new_run(config, device, load_init=checkpoint is None)
        if rank():
            caught = _start(run, Path(config.out), checkpoint)
        else:
            with _run_directory(config.out) as out:
                caught = _start(run, out, checkpoint)
        if not rank():
            _say_how_it_ended(run, Path(config.out))
        if run.step == run.steps:
            return 0
        return 128 + caught if caught == signal.SIGINT else SAVED


def _start(run: Run, out: Path, checkpoint: dict | None) -> int:
    """See `_train`."""
    if checkpoint:
        restore(run, checkpoint)
    if -highest(-run.step) != highest(run.step):
        raise InputError(f"not all processes find the same checkpoint in {out}")
    if not rank():
        if run.step and not (out / "last.pt").exists():  # it came from another run's directory
            save_checkpoint(out / "last.pt", run)
        found = {
            "device": str(run.loader.device),
            "loader": run.loader.backend,
            "processes": world_size(),
            "steps": run.steps,
            "scaled_lr": run.lr,
            "images": len(run.loader.data),
            "classes": len(run.loader.data.classes),
            "versions": versions(),
        }
        write_config(out / "config.yaml", run.config)
        write_json(out / "run.json", found)
    return _train(run, out)


def _train(run: Run, out: Path) -> int:
    """To the last step, or until a signal comes to any process; returns its number, or 0."""
    with (
        _signals() as caught,
        StepLog(out, run.step, run.steps, run.loader) as log,
        _endless(run.loader) as batches,
    ):
        while run.step < run.steps:
            log.times.mark("other")
            batch = next(batches)
            log.times.mark("data")
            for group in run.optimizer.param_groups:
                group["lr"] = run.lr if group["fixed_lr"] else run.rate()
            losses = train_step(run, batch, log.times.mark)
            run.step += 1
            log.add(run.step, batch, losses, run.optimizer.param_groups[0]["lr"])
            stop = highest(caught[0] if caught else 0)
            epoch_ends = run.step % len(run.loader) == 0
            if stop or run.step == run.steps or epoch_ends:
                log.flush()  # refuses a loss that is not finite before it gets into a checkpoint
                run.loader.bad_images |= of_all_ranks(dict(run.loader.bad_images))
                if not rank():
                    _save(run, out, log, epoch_ends)
            if stop:
                barrier()  # the first process that ends makes torchrun end the others
                return stop
    return 0


def train_step(run: Run, batch: Batch, mark: Callable[[str], None]) -> dict[str, Tensor]:
    """One update of the weights; the means of the losses of the batch's parts, see
    `Method.forward`. `mark` is told which part of the step has ended."""
    config, parts = run.config, run.config.accumulate
    dtype = getattr(torch, config.precision)
    run.model.before_step()
    run.optimizer.zero_grad()
    total: dict[str, Tensor] = {}
    for i, (views, labels) in enumerate(
        zip(batch.views.chunk(parts, dim=1), batch.labels.chunk(parts))
    ):
        waits = world_size() > 1 and i < parts - 1  # gradients are exchanged with the last part
        with run.trained.no_sync() if waits else nullcontext():
            with torch.autocast(views.device.type, dtype, enabled=dtype != torch.float32):
                losses = run.trained(views, labels, config.eta)
            mark("forward")
            run.scaler.scale(losses["loss"] / parts).backward()
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss.detach() / parts
        mark("backward")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    mark("optimizer")
    return total


def _save(run: Run, out: Path, log: StepLog, epoch_ends: bool) -> None:
    """The checkpoint and the page. What an epoch is worth is its accuracy, or minus its loss."""
    score = -math.inf
    if epoch_ends:
        score = -log.epoch_loss()
        if run.knn:
            try:
                score = run.knn.accuracy(run.model.backbone)
            except InputError:  # an image that cannot be read: the epoch is not lost for that
                save_checkpoint(out / "last.pt", run)
                raise
            log.note(run.step, {"knn_top1": score})
    best, run.best = score > run.best, max(score, run.best)
    save_checkpoint(out / "last.pt", run)
    if epoch_ends:
        keep_checkpoint(out / "last.pt", run.step // len(run.loader), run.config.keep, best)
    write_run_page(out, run.config, run.loader)


def _new_run(config: PretrainConfig, device: torch.device, load_init: bool) -> Run:
    part = part_size(config, world_size())
    loader = ViewLoader(
        _roots(config),
        getattr(recipes, config.recipe)(config.spd, config.local_aug, config.spd_source),
        part * config.accumulate,
        config.loader,
        size=config.size,
        device=device,
        seed=config.seed,
        rank=rank(),
        world_size=world_size(),
        workers=config.workers,
        skip_bad_images=config.skip_bad_images,
        parts=config.accumulate,
    )
    torch.manual_seed(config.seed)
    model = _new_method(config, len(loader.data.classes))
    if load_init and str(config.init) != "random":
        model.start_from(load_backbone(config.backbone, config.init))
    if config.sync_bn and world_size() > 1:
        model = sync_batch_norms(model, device)
    model.to(device, memory_format=torch.channels_last)
    if config.compile:
        check_can_compile(device)
        model.backbone.compile()  # in place: the state dict keeps its names
        if config.recipe == "moco":
            model.key_backbone.compile()
    lr = config.lr * config.batch_size / 256
    scaled = config.precision == "float16"
    optimizer = new_optimizer(
        config.optimizer, model, lr, config.momentum, config.weight_decay, scaled
    )
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    steps = min(config.epochs * len(loader), config.max_steps or math.inf)
    knn = None
    if config.knn and not rank():
        knn = KnnMonitor(loader.data, config.knn, config.size, device, config.workers)
    return Run(config, model, averaged(model), optimizer, scaler, loader, knn, lr, steps)


def _roots(config: PretrainConfig) -> str | Path | Sequence[str | Path]:
    """What `open_images` takes: what was given, or the normal training images of a category."""
    if config.category is None:
        return config.data
    root = config.data if isinstance(config.data, str | Path) else config.data[0]
    (category,) = read_dataset(root, "1cls", [config.category])
    return [sample.image for sample in category.train]


def _new_method(config: PretrainConfig, classes: int) -> Method:
    given = {name: getattr(config, name) for name in METHOD_SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    if config.recipe == "supervised":
        if classes < 2:
            raise InputError(
                "supervised needs images of at least two classes, a folder each, got one"
            )
        given["classes"] = classes
    method = METHODS[config.recipe](config.backbone, **given)
    method.shared_forward = config.shared_forward
    if config.spd and config.spd_loss == "xent":
        method.add_spd_classifier()
    return method


# -------------------------------------------------------------------------- around the loop


@contextmanager
def _run_directory(path: str | Path) -> Iterator[Path]:
    """The directory of a run; if the block fails before the first step, no trace is left there."""
    existed = Path(path).exists()
    out = make_output_dir(path)
    before = set(out.iterdir())
    for leftover in out.glob(".*.pt.*"):  # of a process that was killed while it saved
        leftover.unlink()
    try:
        yield out
    except BaseException:
        log = out / "metrics.jsonl"
        if not log.exists() or log.stat().st_size == 0:
            for name in ("config.yaml", "run.json", "metrics.jsonl"):
                if out / name not in before:
                    (out / name).unlink(missing_ok=True)
            if out / "tensorboard" not in before:
                shutil.rmtree(out / "tensorboard", ignore_errors=True)
            if not existed and not any(out.iterdir()):
                out.rmdir()
        raise


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGUSR1 are noted in the list. A second one acts as it did before; of
    several processes torchrun, which passes on what the scheduler has sent them already, ends them
    if they do not end."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame) -> None:
        caught.append(int(number))
        if world_size() == 1:
            restore()

    try:
        for number in numbers:
            signal.signal(number, note)
        yield caught
    finally:
        restore()


@contextmanager
def _endless(loader: ViewLoader) -> Iterator[Iterator[Batch]]:
    """Batches of one epoch after the other; the loader's threads end with the block."""

    def epochs():
        while True:
            yield from loader

    with closing(epochs()) as batches:
        yield batches


def _say_how_it_ended(run: Run, out: Path) -> None:
    bad_images = run.loader.bad_images
    if bad_images:
        tqdm.write(f"{len(bad_images)} unreadable images were replaced by others:")
        for reason in bad_images.values():
            tqdm.write(f"  {reason}")
    if run.step < run.steps:
        tqdm.write(f"stopped after step {run.step} of {run.steps}: resume from {out / 'last.pt'}")
    else:
        tqdm.write(f"checkpoint: {out / 'last.pt'} (step {run.step})")
