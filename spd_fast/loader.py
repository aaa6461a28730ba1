"""The loader of pre-training: image files in, batches of views out, made by threads or by DALI.

Which samples a batch holds, and how they are augmented, depends on the seed, the epoch and the
place in it; never on the number of threads or ranks, on where a run was interrupted, or on who
makes the views. Threads are enough: decoding and augmenting release the GIL.
"""

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spd_fast.choices import LOADERS
from spd_fast.datasets.images import read_image
from spd_fast.datasets.shards import Images, open_images
from spd_fast.errors import InputError
from spd_fast.models import pick_device
from spd_fast.ops.augment_views import augment_views
from spd_fast.ops.memory import on_huge_pages
from spd_fast.recipes import Recipe
from spd_fast.views import COLUMNS, sample_view_params

AHEAD = 2  # batches in the making while the consumer has one
CHUNK = 16  # images per task: few enough to spread, enough to make the cost of the calls small


class Batch(NamedTuple):
    """One rank's part of a batch."""

    views: Tensor  # (V, N, 3, S, S), normalised; views[k] is one contiguous batch of view k
    labels: Tensor  # (N,) int64, class of each image
    indices: Tensor  # (N,) int64, place of each image in the data set; always on the CPU
    params: Tensor  # (N, V, 27) float32, of the views: see `spd_fast.views`; always on the CPU


Made = tuple[Tensor, Tensor, np.ndarray]  # views, params and indices of a batch


class ViewLoader:
    """Shuffled batches of augmented views.

    Iterating gives the batches of one epoch, from where the loader stands, and then moves on to the
    next epoch: `for epoch in range(100): for batch in loader: ...`. A last batch that is not full
    is left out. `state_dict` between two batches, anywhere in an epoch, describes what follows.

    Epoch e visits the samples in an order that depends on (seed, e) only. Each global batch of
    batch_size * world_size samples is a contiguous piece of it, of which rank r has the r-th part:
    two ranks with batch_size B together see what one rank with 2B sees.

    With `skip_bad_images`, a sample that cannot be read is replaced by the next sample of the data
    set (by index, cyclically) that can, with that sample's label and views, and noted in
    `bad_images`.

    A batch's memory is used again once nothing refers to the batch; for that the loader keeps the
    memory of up to AHEAD + 2 batches.

    Args:
        data: directories of images, or archives (tar shards, TFRecord files): what `open_images` of
            `spd_fast.datasets.shards` takes or has returned.
        recipe: the views to make, from `spd_fast.recipes`.
        batch_size: N, images per batch of this rank.
        backend: who makes the batches, which are the same: "torch", threads of this class, or
            "dali", see `spd_fast.dali`. "auto" is what SPD_FAST_LOADER says in the environment, or
            else DALI if it is there, on a CPU only if its operators have been built already.
        size: S, height and width of the views, pixels.
        device: where the batches are delivered: "auto", "cpu" or "cuda", see `pick_device`.
        seed: of order and views, at least 0.
        rank, world_size: which part of each global batch is this process's.
        workers: threads that read, decode and augment.
        skip_bad_images: replace unreadable images instead of raising.
        parts: pieces that the consumer will cut each batch into: the kth pieces of all ranks are
            the kth piece of the global batch.
        channels_last: memory order of the views; the fast one for convolutions.
        dtype: of the views, see `spd_fast.augment_views`.

    Attributes:
        bad_images: path -> reason, of the images that were replaced.
        wait_seconds: how long iterating has waited for views so far.

    Raises:
        InputError: no images, fewer than one global batch, an argument out of range, no such
            device, or DALI is asked for and missing; while iterating, an unreadable image (the
            message names it).
    """

    def __init__(
        self,
        data: Images | str | Path | Iterable[str | Path],
        recipe: Recipe,
        batch_size: int,
        backend: str = "auto",
        size: int = 224,
        device: str | torch.device = "cpu",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        skip_bad_images: bool = False,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
        parts: int = 1,
    ):
        for name, value in (("batch_size", batch_size), ("workers", workers), ("size", size)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if parts < 1 or batch_size % parts:
            raise InputError(f"batch_size {batch_size} cannot be cut into {parts} equal parts")
        if seed < 0 or not 0 <= rank < world_size:
            raise InputError(
                f"seed must be at least 0 and rank within 0..world_size - 1, got seed {seed}, "
                f"rank {rank}, world_size {world_size}"
            )
        self.data = data if isinstance(data, Images) else open_images(data)
        self.recipe, self.batch_size, self.size = recipe, batch_size, size
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.seed, self.skip_bad_images, self.parts = seed, skip_bad_images, parts
        self.channels_last, self.dtype = channels_last, dtype
        self.device = pick_device(str(device))
        self.backend = _pick_backend(backend, self.device)
        self.labels = np.asarray(self.data.labels, dtype=np.int64)
        # Memory of batches that are gone; as many as there are while the consumer still holds one.
        self._unused: deque[Tensor] = deque(maxlen=AHEAD + 2)
        self.epoch = 0
        self.next_batch = 0  # within the epoch; what the consumer has not had yet
        self.bad_images: dict[str, str] = {}
        self.wait_seconds = 0.0
        if len(self) == 0:
            raise InputError(
                f"a batch needs {batch_size * world_size} images, but the data has only "
                f"{len(self.data)}"
            )
        self._dali = _new_dali_maker(self) if self.backend == "dali" else None

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.data) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        process = os.getpid()
        samples = self._samples(self.epoch)[self.next_batch :]
        with closing(self._made(self.epoch, samples)) as made:
            while True:
                started = time.perf_counter()
                batch = next(made, None)
                self.wait_seconds += time.perf_counter() - started
                if batch is None:
                    return
                self._advance()
                yield self._batch(*batch)
                batch = None  # or its memory could not be used again yet
                if os.getpid() != process:  # the threads are the parent's
                    raise InputError("batches cannot be taken on in a forked child: iterate anew")

    def _made(self, epoch: int, samples: np.ndarray) -> Iterator[Made]:
        if self.backend == "torch":
            return self._made_by_threads(epoch, samples)
        if self._dali.is_busy():  # with another iteration
            return _new_dali_maker(self).made(epoch, samples)
        return self._dali.made(epoch, samples)

    def _made_by_threads(self, epoch: int, samples: np.ndarray) -> Iterator[Made]:
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="spd-fast-loader")
        try:
            jobs = (self._start(pool, stop, epoch, indices) for indices in samples)
            waiting = deque(islice(jobs, AHEAD))
            while waiting:
                *made, tasks = waiting.popleft()
                for task in tasks:
                    task.result()
                waiting.extend(islice(jobs, 1))
                yield tuple(made)
                made = None
        finally:  # the epoch's end, an error here, or the consumer has left: no thread stays behind
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _samples(self, epoch: int) -> np.ndarray:
        """(batches, N) int64: the samples of this rank's batches."""
        # Key word 1 is 1: `views` draws from the streams with 0. Sorting raw Philox numbers is the
        # same for every numpy, which Generator.permutation does not promise.
        philox = np.random.Philox(key=[self.seed, 1], counter=[0, 0, 0, epoch])
        order = np.argsort(philox.random_raw(len(self.data)), kind="stable")
        global_batches = order[: len(self) * self.batch_size * self.world_size]
        shared = global_batches.reshape(len(self), self.parts, self.world_size, -1)
        return shared[:, :, self.rank].reshape(len(self), self.batch_size)

    def _start(
        self, pool: ThreadPoolExecutor, stop: threading.Event, epoch: int, indices: np.ndarray
    ) -> tuple[Tensor, Tensor, np.ndarray, list[Future]]:
        """Set the tasks of one batch going; they fill its views and correct its indices."""
        views, indices = self._empty_views(len(indices)), indices.copy()
        params = torch.empty(len(indices), len(self.recipe), len(COLUMNS))
        tasks = []
        for i in range(0, len(indices), CHUNK):
            part = slice(i, i + CHUNK)
            # The context carries `use_backend` over; each task needs its own copy.
            run = copy_context().run
            to = views[:, part], params[part], indices[part]
            tasks.append(pool.submit(run, self._fill, *to, epoch, stop))
        return views, params, indices, tasks

    def _empty_views(self, n: int) -> Tensor:
        v, s = len(self.recipe), self.size
        shape = (v, n, s, s, 3) if self.channels_last else (v, n, 3, s, s)
        views = self._memory(math.prod(shape) * self.dtype.itemsize).view(self.dtype).view(shape)
        return views.permute(0, 1, 4, 2, 3) if self.channels_last else views

    def _memory(self, size: int) -> Tensor:
        """(size,) uint8, not initialised: that of an earlier batch if nobody holds it any more.

        The first write to fresh memory enters the kernel at every page, which takes longer than
        making the views. Pinned memory is recycled by torch itself.
        """
        if self.device.type == "cuda":
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        kept = self._unused.pop() if self._unused else None
        if kept is None or kept.numel() != size:
            kept = on_huge_pages(torch.empty(size, dtype=torch.uint8))
        array = kept.numpy()  # dies with the last tensor made from it
        weakref.finalize(array, self._unused.append, kept).atexit = False
        return torch.from_numpy(array)

    def _fill(
        self,
        views: Tensor,
        params: Tensor,
        indices: np.ndarray,
        epoch: int,
        stop: threading.Event,
    ) -> None:
        """Read the samples at `indices` (changed where one is replaced), write their views."""
        images = []
        for k, index in enumerate(indices):
            if stop.is_set():
                return
            image, indices[k] = self.read(int(index))
            images.append(image)
        sizes = [image.shape[:2] for image in images]
        params[:] = sample_view_params(self.recipe, sizes, indices, epoch, self.seed, self.size)
        augment_views(images, params, out=views, threads=1)

    def read(self, index: int, read: Callable | None = None) -> tuple[np.ndarray, int]:
        """What `read` gives for the image at `index`, or for the first readable one after it; and
        its index. By default the decoded image."""
        n = len(self.data)
        for step in range(n):
            candidate = (index + step) % n
            path = self.data.paths[candidate]
            if self.skip_bad_images and str(path) in self.bad_images:
                continue
            try:
                return (read or read_image)(path), candidate
            except InputError as error:
                if not self.skip_bad_images:
                    raise
                self.bad_images[str(path)] = str(error)
        raise InputError(f"none of the {n} images of the data can be read")

    def _batch(self, views: Tensor, params: Tensor, indices: np.ndarray) -> Batch:
        labels = torch.from_numpy(self.labels[indices])
        return Batch(
            views.to(self.device, non_blocking=True),
            labels.to(self.device, non_blocking=True),
            torch.from_numpy(indices),
            params,
        )

    def _advance(self) -> None:
        self.next_batch += 1
        if self.next_batch == len(self):
            self.epoch, self.next_batch = self.epoch + 1, 0

    def state_dict(self) -> dict:
        """Where the loader stands, and which data it stands in; plain values only."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "next_batch": self.next_batch,
            "global_batch": self.batch_size * self.world_size,
            "images": len(self.data),
            "fingerprint": self.data.fingerprint,
            "bad_images": dict(self.bad_images),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state`, exactly; the number of ranks and threads may differ.

        Raises:
            InputError: the state is of other data, or of another global batch size.
        """
        own = self.state_dict()
        if (state["images"], state["fingerprint"]) != (own["images"], own["fingerprint"]):
            raise InputError(
                f"the data is not the one of the saved state: {own['images']} images with "
                f"fingerprint {own['fingerprint']} instead of {state['images']} with "
                f"{state['fingerprint']}"
            )
        if state["global_batch"] != own["global_batch"]:
            raise InputError(
                f"batch_size * world_size is {own['global_batch']}, but {state['global_batch']} in "
                f"the saved state"
            )
        self.seed, self.epoch, self.next_batch = state["seed"], state["epoch"], state["next_batch"]
        self.bad_images = dict(state["bad_images"])


def _new_dali_maker(loader: ViewLoader):
    from spd_fast.dali import DaliMaker

    return DaliMaker(loader)


def _pick_backend(asked: str, device: torch.device) -> str:
    """Either "torch" or "dali"."""
    name = asked
    if name == "auto":
        name = os.environ.get("SPD_FAST_LOADER") or "auto"
    if name not in LOADERS:
        raise InputError(f"the loader's backend is one of {', '.join(LOADERS)}; got {name!r}")
    if name == "torch":
        return name
    from spd_fast import dali

    reasons = dali.missing(device)
    if name == "dali" and reasons:
        raise InputError(f"the loader's backend dali cannot be used: {'; '.join(reasons)}")
    return "dali" if name == "dali" or (not reasons and dali.is_ready(device)) else "torch"
