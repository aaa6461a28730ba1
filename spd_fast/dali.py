"""The loader's batches made by DALI: it decodes and runs our operators, on its own threads.

DALI's readers shuffle in an order of their own. So threads here read the encoded images, of files,
tar shards or TFRecords, in the loader's order, and hand them over; nothing inside DALI has a state,
and a batch depends on its place alone.

What DALI decodes otherwise than `read_image`, or not at all, is decoded by `read_image` and handed
over uncompressed: whatever is no JPEG of gray or colour (with CMYK it is off by 1 of 255), and the
images of a batch in which DALI has refused one, which also tells which one it is and why.
"""

import ctypes
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spd_fast import dali_build
from spd_fast.datasets.images import ImageInArchive, read_bytes, read_image
from spd_fast.errors import InputError
from spd_fast.loader import AHEAD, CHUNK, Made, ViewLoader
from spd_fast.ops.augment_views import CUDA_HEIGHT, CUDA_VIEWS, augment_views
from spd_fast.ops.backends import asked_backend
from spd_fast.views import range_table, sample_view_params

JPEG = b"\xff\xd8"  # how a file begins


def missing(device: torch.device) -> list[str]:
    """Why DALI cannot make batches for this device. On a GPU it needs no compiler: without our
    operators the views are made after it, by the backends of `augment_views`."""
    if device.type == "cuda" and dali_build.dali_version():
        return []
    return dali_build.missing()


def is_ready(device: torch.device) -> bool:
    """Whether DALI, where nothing is missing, is to be preferred to threads: it was faster wherever
    both have been measured (bench/README.md), but a CPU's user is not made to wait for a compiler
    unasked."""
    return device.type == "cuda" or dali_build.is_built()


class DaliMaker:
    """What a ViewLoader with the backend "dali" has its batches from.

    A pipeline stays from epoch to epoch. One that was left early, has failed, or belongs to the
    parent of a forked process is replaced.

    Raises:
        InputError: the operators cannot be built.
    """

    def __init__(self, loader: ViewLoader):
        self.loader = weakref.proxy(loader)  # which holds this
        self.has_operator = _load_operator(loader)
        self.feed = _Feed()
        self.pipeline = None
        self.process, self.busy = os.getpid(), False
        self.undecodable: set[str] = set()  # by DALI, but not by `read_image`

    def made(self, epoch: int, samples: np.ndarray) -> Iterator[Made]:
        """The batches of these samples (batches, N), in order."""
        stop, process = threading.Event(), os.getpid()
        pool = ThreadPoolExecutor(self.loader.workers, thread_name_prefix="spd-fast-loader")
        finished, self.busy = False, True
        try:
            self._prepare()
            self.feed.jobs = (_Job(self, pool, stop, epoch, indices) for indices in samples)
            while found := self._next():
                yield self._made_of(*found)
                del found  # or its memory could not be used again yet
            self.pipeline.reset()
            finished = True
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            if process == os.getpid():  # else it is the parent's pipeline that this one had
                if not finished:
                    self.pipeline = None
                self.feed.clear()
                self.busy = False

    def is_busy(self) -> bool:
        """Whether somebody iterates already."""
        return self.busy and self.process == os.getpid()

    def _prepare(self) -> None:
        has_operator = _load_operator(self.loader)
        if self.process != os.getpid():  # its threads are the parent's
            self.feed, self.process, self.pipeline = _Feed(), os.getpid(), None
        if self.pipeline is None or has_operator != self.has_operator:
            self.has_operator = has_operator
            self.pipeline = None  # the old one's threads end first
            self.pipeline = self._new_pipeline()

    def _next(self) -> "tuple[_Job, tuple] | None":
        """The next job and DALI's outputs; None at the end.

        Raises:
            InputError: an image that cannot be read, at its turn.
            RuntimeError: DALI fails, and not because of an image.
        """
        device = self.loader.device
        stream = [torch.cuda.current_stream(device)] if device.type == "cuda" else []
        while True:
            try:
                outputs = self.pipeline.run(*stream)
                return self.feed.given.popleft(), outputs
            except StopIteration:
                if self.feed.error:
                    raise self.feed.error from None
                return None
            except RuntimeError:  # DALI says neither which file nor, at times, which image
                if all(job.decoded_here for job in self.feed.given):
                    raise
            self.pipeline = None  # it uses the jobs' memory until its threads have ended
            self._decode_given()
            self.pipeline = self._new_pipeline()

    def _decode_given(self) -> None:
        """Let what a failed pipeline was given be given to the next one, decoded here."""
        given = list(self.feed.given)
        for job in given:
            job.start(_uncompressed)
        first = given[0]
        if first.is_as_wanted():
            paths = self.loader.data.paths
            self.undecodable.update(str(paths[i]) for i in first.wanted)
        self.feed.again.extendleft(reversed(given))
        self.feed.given.clear()

    def read(self, path: str | Path | ImageInArchive) -> bytes | np.ndarray:
        """What DALI gets of an image."""
        if self.undecodable and str(path) in self.undecodable:
            return _uncompressed(path)
        data = read_bytes(path)
        return data if _is_plain_jpeg(data) else _uncompressed(path)

    def _new_pipeline(self):
        from nvidia.dali import Pipeline, fn, types

        loader = self.loader
        gpu = loader.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=loader.batch_size,
            num_threads=loader.workers,
            device_id=_number_of(loader.device) if gpu else None,
            prefetch_queue_depth=AHEAD,
            exec_dynamic=True,  # else outputs would have to be copied
        )
        with pipeline:
            encoded, places = fn.external_source(
                self.feed.take,
                num_outputs=2,
                no_copy=not gpu,  # for a GPU DALI copies into pinned memory
                dtype=[types.UINT8, types.INT64],
                ndim=[1, 1],
            )
            images = fn.decoders.image(
                encoded,
                device="mixed" if gpu else "cpu",
                jpeg_fancy_upsampling=True,  # of chroma, on a GPU as on a CPU
                affine=False,  # else the ranks of a node would all bind threads to its first cores
            )
            outputs = (images, places)
            if self.has_operator:
                outputs = self._operators(images, places)
            pipeline.set_outputs(*outputs)
        pipeline.build()
        _pipelines.add(pipeline)
        return pipeline

    def _operators(self, images, places) -> tuple:
        """Views and their parameters."""
        from nvidia.dali import fn

        loader = self.loader
        size = [loader.size, loader.size]
        table = range_table(tuple(loader.recipe), *size)
        params = fn.spd.sample_view_params(
            images,
            places,
            ranges=" ".join(map(repr, table.ravel().tolist())),
            size=size,
        )
        views = fn.spd.augment_views(
            images,
            params,
            size=size,
            dtype=str(loader.dtype).removeprefix("torch."),
            channels_last=loader.channels_last,
            views_first=True,
        )
        return views, params

    def _made_of(self, job: "_Job", outputs: tuple) -> Made:
        """Tensors over DALI's memory, which lives as long as they do."""
        loader = self.loader
        if not self.has_operator:
            return *self._views_after(job, outputs[0]), job.indices
        views, params = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        v, n, s = len(loader.recipe), len(job.indices), loader.size
        views = views.view(loader.dtype)  # bfloat16 comes as uint16
        if loader.channels_last:
            views = views.view(v, n, s, s, 3).permute(0, 1, 4, 2, 3)
        else:
            views = views.view(v, n, 3, s, s)
        return views, params, job.indices

    def _views_after(self, job: "_Job", decoded) -> tuple[Tensor, Tensor]:
        """Views and parameters of images that DALI has only decoded."""
        loader = self.loader
        images = [torch.from_dlpack(decoded[i]) for i in range(len(decoded))]
        sizes = [image.shape[:2] for image in images]
        place = job.indices, job.epoch, loader.seed, loader.size
        params = sample_view_params(loader.recipe, sizes, *place)
        kind = {"dtype": loader.dtype, "channels_last": loader.channels_last}
        views = augment_views(images, params, loader.size, threads=loader.workers, **kind)
        return views, params


class _Job:
    """One batch, whose images threads read; its indices change where one is replaced."""

    def __init__(
        self,
        maker: DaliMaker,
        pool: ThreadPoolExecutor,
        stop: threading.Event,
        epoch: int,
        indices: np.ndarray,
    ):
        self.loader, self.pool, self.stop = maker.loader, pool, stop
        self.epoch, self.wanted = epoch, indices
        self.start(maker.read)

    def start(self, read: Callable) -> None:
        self.decoded_here = read is _uncompressed
        self.indices = self.wanted.copy()
        self.encoded: list[np.ndarray | None] = [None] * len(self.indices)
        starts = range(0, len(self.indices), CHUNK)
        self.tasks: list[Future] = [self.pool.submit(self._fill, read, i) for i in starts]

    def _fill(self, read: Callable, start: int) -> None:
        for k in range(start, min(start + CHUNK, len(self.wanted))):
            if self.stop.is_set():
                return
            data, self.indices[k] = self.loader.read(int(self.wanted[k]), read)
            self.encoded[k] = np.frombuffer(data, np.uint8)

    def is_as_wanted(self) -> bool:
        """Whether all images were read, and none replaced; waits for them."""
        failed = [task.exception() for task in self.tasks]
        return not any(failed) and np.array_equal(self.indices, self.wanted)

    def inputs(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Encoded images, and (N, 3) int64 seeds, epochs and indices; waits for them."""
        for task in self.tasks:
            task.result()
        places = np.empty((len(self.indices), 3), np.int64)
        places[:, 0], places[:, 1], places[:, 2] = self.loader.seed, self.epoch, self.indices
        return self.encoded, places


class _Feed:
    """Where a pipeline takes its input from. It does not know the pipeline, which holds it."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.jobs: Iterator[_Job] = iter(())
        self.reading: deque[_Job] = deque()
        self.again: deque[_Job] = deque()  # what a failed pipeline was given
        self.given: deque[_Job] = deque()  # what the pipeline has; their memory must stay
        self.error: Exception | None = None  # of a job: it ends the epoch after those before it

    def take(self) -> tuple[list[np.ndarray], np.ndarray]:
        """What DALI calls for the next batch."""
        self.reading.extend(islice(self.jobs, AHEAD + 1 - len(self.reading)))
        source = self.again or self.reading
        if self.error or not source:
            raise StopIteration
        job = source.popleft()
        try:
            inputs = job.inputs()
        except Exception as error:
            self.error = error
            raise StopIteration from None
        self.given.append(job)
        return inputs


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether it is a JPEG of one or three colours, as far as its header tells."""
    at = 2
    while data.startswith(JPEG) and at + 10 <= len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame's header
            return data[at + 9] in (1, 3)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _uncompressed(path: str | Path | ImageInArchive) -> np.ndarray:
    """The image as `read_image` decodes it, as the bytes of a PPM file."""
    pixels = read_image(path)
    height, width, _ = pixels.shape
    header = np.frombuffer(f"P6 {width} {height} 255\n".encode(), np.uint8)
    return np.concatenate([header, pixels.reshape(-1)])


def _load_operator(loader: ViewLoader) -> bool:
    """Whether our operators run inside DALI, which must not be if another backend is asked for."""
    gpu = loader.device.type == "cuda"
    if asked_backend() not in ("auto", "cuda" if gpu else "native"):
        return False
    too_large = len(loader.recipe) > CUDA_VIEWS or loader.size > CUDA_HEIGHT
    if gpu and (too_large or dali_build.missing(cuda=True)):
        return False
    try:
        dali_build.load()
    except InputError as error:
        if not gpu:
            raise
        warnings.warn(f"views are made after DALI, not inside it: {error}", stacklevel=2)
        return False
    return dali_build.has_gpu_operator() if gpu else True


def _number_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


# --------------------------------------------------------------------------------- forked children

_pipelines: weakref.WeakSet = weakref.WeakSet()  # that are alive


def _keep_pipelines() -> None:
    """In a forked child the pipelines' threads do not exist, so that ending them would wait for
    ever: one reference more, and that is never done."""
    for pipeline in list(_pipelines):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipeline))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_pipelines)
