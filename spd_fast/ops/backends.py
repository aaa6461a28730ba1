"""Several implementations of one operation, and which of them runs.

Each operation lists its backends in order of preference. "auto" takes the first that has no reason
against the arguments; a backend asked for by name (argument, `use_backend`, or the environment
variable SPD_FAST_BACKEND, in this order) raises with its reasons if it cannot take them.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch

from spd_fast.errors import InputError

try:
    from spd_fast import _C as native
except ImportError as error:
    native = None
    _NATIVE_MISSING = [f"the compiled module spd_fast._C cannot be imported ({error})"]
else:
    _NATIVE_MISSING = []


@dataclass(frozen=True)
class Backend:
    """One implementation. `function` and `reasons` take the operation's own arguments."""

    name: str
    device: str  # for `spd-fast info`
    function: Callable
    reasons: Callable[..., list[str]]  # why it cannot take these arguments; empty: it can
    missing: Callable[[], Sequence[str]] = tuple  # why it cannot run here, whatever the arguments


OLDEST_TRITON = (3, 4)  # that takes tuples as arguments, and has its settings in triton.knobs
OLDEST_GPU = (7, 5)  # compute capability: Turing

OPERATIONS: dict[str, tuple[Backend, ...]] = {}

_asked: ContextVar[str | None] = ContextVar("spd_fast_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """In this block, and in this thread, every operation runs on backend `name` ("auto": any)."""
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def asked_backend() -> str:
    """What `use_backend` or the environment asks for."""
    return _asked.get() or os.environ.get("SPD_FAST_BACKEND") or "auto"


def select(operation: str, asked: str | None, *arguments) -> Backend:
    """The backend of `operation` that runs for these arguments.

    Raises:
        InputError: the backend asked for does not exist, or cannot take the arguments.
    """
    backends = OPERATIONS[operation]
    name = asked or asked_backend()
    if name not in ("auto", *(b.name for b in backends)):
        known = ", ".join(b.name for b in backends)
        raise InputError(f"{operation} has no backend {name!r}; there are: auto, {known}")
    refusals = []
    for backend in backends:
        if name in ("auto", backend.name):
            reasons = backend.missing() or backend.reasons(*arguments)
            if not reasons:
                return backend
            refusals.append(f"{backend.name}: {'; '.join(reasons)}")
    raise InputError(f"{operation} cannot run on these arguments ({' | '.join(refusals)})")


def call(operation: str, body: Callable, *arguments, mutated: Sequence[torch.Tensor] = ()):
    """What `torch.ops.spd_fast.<operation>`, whose body this is, returns for these arguments.

    Torch's dispatcher is needed where a call is traced (torch.compile, fake tensors) and for
    gradients, which are refused. Elsewhere the body is called at once: the dispatcher takes as long
    as the check of the arguments, and a custom operation's first call imports torch._dynamo, which
    takes a second and 100 MB unless something else did.
    """
    if torch.compiler.is_compiling() or any(map(_needs_dispatcher, arguments)):
        return getattr(torch.ops.spd_fast, operation)(*arguments)
    result = body(*arguments)
    for tensor in mutated:
        torch.autograd.graph.increment_version(tensor)
    return result


def _needs_dispatcher(argument) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(map(_needs_dispatcher, argument))
    if not isinstance(argument, torch.Tensor):
        return False
    return argument.requires_grad or type(argument) is not torch.Tensor


def native_backend(function: Callable, reasons: Callable[..., list[str]]) -> Backend:
    """The CPU backend in C++."""
    return Backend("native", "cpu", function, reasons, lambda: _NATIVE_MISSING)


def triton_backend(function: Callable, reasons: Callable[..., list[str]]) -> Backend:
    """The GPU backend in Triton. With TRITON_INTERPRET=1 it takes CPU tensors, for tests."""
    return Backend("triton", "cuda", function, reasons, _triton_missing)


def cuda_backend(function: Callable, reasons: Callable[..., list[str]]) -> Backend:
    """The GPU backend in CUDA C++, which is there if the compiled module was built with it."""
    return Backend("cuda", "cuda", function, reasons, _cuda_missing)


def _cuda_missing() -> Sequence[str]:
    if native is None:
        return _NATIVE_MISSING
    if not hasattr(native, "cuda_mahalanobis_map"):
        return ["the compiled module was built without CUDA"]
    return _gpu_missing()


def _gpu_missing() -> list[str]:
    usable = torch.cuda.is_available() and torch.version.hip is None
    return [] if usable else ["no NVIDIA GPU that torch can use"]


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_missing() -> list[str]:
    version = _triton_version()
    if version < OLDEST_TRITON:
        return ["triton {}.{} or newer is not installed".format(*OLDEST_TRITON)]
    return [] if interpreted() else _gpu_missing()


@cache
def _triton_version() -> tuple[int, ...]:
    try:
        return tuple(map(int, metadata.version("triton").split(".")[:2]))
    except (metadata.PackageNotFoundError, ValueError):
        return ()


def reference_backend(function: Callable) -> Backend:
    """The plain-torch backend, which takes everything."""
    return Backend("reference", "any", function, lambda *arguments: [])


def not_on_cpu(tensors: Sequence[torch.Tensor]) -> list[str]:
    """The native backends' reason against tensors on another device."""
    if all(t.is_cpu for t in tensors):
        return []
    devices = sorted({t.device.type for t in tensors} - {"cpu"})
    return [f"needs CPU tensors, got {', '.join(devices)}"]


def not_on_one_gpu(tensors: Sequence[torch.Tensor]) -> list[str]:
    """The GPU backends' reason against tensors on other devices."""
    devices = {t.device for t in tensors}
    if len(devices) > 1 or not tensors[0].is_cuda:
        return [f"needs tensors on one GPU, got {', '.join(sorted(map(str, devices)))}"]
    capability = torch.cuda.get_device_capability(tensors[0].device)
    return [] if capability >= OLDEST_GPU else ["needs a GPU of compute capability 7.5 or newer"]


def not_for_triton(tensors: Sequence[torch.Tensor]) -> list[str]:
    """The Triton backends' reason against tensors on other devices."""
    return not_on_cpu(tensors) if interpreted() else not_on_one_gpu(tensors)


def stream_of(tensor: torch.Tensor) -> int:
    """Address of the stream that torch uses on the tensor's GPU at present."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def thread_count(threads: int) -> int:
    """0 means as many threads as torch uses."""
    return threads or torch.get_num_threads()
