"""Models of the numpy re-implementation of PaDiM (xiahaifeng1995/PaDiM-Anomaly-Detection-...).

It keeps a category's Gaussians as a pickle of [mean (d, P), covariance (d, d, P)], both float32,
the ridge of 0.01 added, and does not store which channels they are of.
"""

import math
import pickle
import random
from pathlib import Path

import numpy as np
import torch

from spd_fast.detector import channels_of_layers
from spd_fast.errors import InputError
from spd_fast.ops.factor import factor_from, find_dtype
from spd_fast.padim import PaDiM

SEED = 1024  # of Python's generator, from which it draws the channels
STRIDE = 4  # pixels to a step of layer1's grid


def read_numpy_padim(
    path: str | Path,
    backbone: str = "resnet18",
    weights: str | Path = "imagenet",
    factor_dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> PaDiM:
    """A `PaDiM`, ready to score, from the pickle of the numpy re-implementation.

    Nothing in the file is executed: of what a pickle can name, only float arrays are understood.
    The channels are drawn again as it drew them, by `random.sample` after `random.seed(1024)`. The
    number of images is not in the file, so `count` of the result is 0.

    Args:
        path: such as `temp_resnet18/train_bottle.pkl`.
        backbone: that of the file, "resnet18" or "wide_resnet50_2".
        weights: those that the features were made with; torchvision's in its code.
        factor_dtype, device: as for `PaDiM`.

    Raises:
        InputError: the file is missing, damaged, names anything but float arrays, or does not hold
            a mean and covariances of a square grid that fit the backbone.
    """
    mean, covariance = _check(path, *_read(path))
    d, positions = mean.shape
    model = PaDiM(backbone, d, "paper", factor_dtype, weights, device=device)
    total = sum(channels_of_layers(model.network))
    drawn = torch.tensor(random.Random(SEED).sample(range(total), d))
    order = drawn.argsort()
    identity = torch.eye(d, dtype=torch.float64)

    def whitening(block: slice) -> torch.Tensor:
        part = torch.from_numpy(covariance[:, :, block].transpose(2, 0, 1).astype(np.float64))
        try:
            lower = torch.linalg.cholesky(part[:, order][:, :, order])
        except torch.linalg.LinAlgError as error:
            raise InputError(
                f"{path} holds a covariance that is not positive definite: {error}"
            ) from error
        return torch.linalg.solve_triangular(lower, identity, upper=False)

    factor = factor_from(whitening, positions, d, find_dtype(factor_dtype), "cpu")
    model.channels = drawn[order].to(model.device)
    model.mean = torch.from_numpy(mean.astype(np.float32))[order].T.contiguous().to(model.device)
    model.factor = factor.to(model.device)
    model.image_size = (STRIDE * math.isqrt(positions),) * 2
    return model


def _check(path, mean: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    d, positions = mean.shape if mean.ndim == 2 else (0, 0)
    if not mean.size or covariance.shape != (d, d, positions):
        raise InputError(
            f"{path} holds arrays of shapes {mean.shape} and {covariance.shape}, expected a mean "
            "(channels, positions) and covariances (channels, channels, positions)"
        )
    if math.isqrt(positions) ** 2 != positions:
        raise InputError(f"{path} has {positions} positions, expected a square grid")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path} holds values that are NaN or infinite")
    return mean, covariance


def _read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file:
            pair = _Unpickler(file).load()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(f"{path} is truncated or not a pickle: {error}") from error
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise InputError(f"{path} holds a {type(pair).__name__}, expected [mean, covariance]")
    arrays = [getattr(item, "array", None) for item in pair]
    if any(type(item) is not _Array for item in pair) or any(a is None for a in arrays):
        kinds = ", ".join(type(item).__name__.strip("_") for item in pair)
        raise InputError(f"{path} holds [{kinds}], expected two arrays")
    return tuple(arrays)


# --------------------------------------------------------------------------------------------------
# A pickle is a program: it names functions and calls them. Each name in an array's pickle gets a
# stand-in here, so that not even numpy's own (whose dtypes can be told that their floats are
# pointers to objects) run on what the file says. Any other name is refused.


class _Dtype:
    def __init__(self, code: str, align=False, copy=False):
        if code not in ("f4", "f8"):
            raise InputError(f"holds an array of type {code!r}, expected f4 or f8 (floats)")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: bytes, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    if type(dtype) is not _Dtype:
        raise InputError("holds an array without a type")
    return np.frombuffer(data, dtype.numpy()).reshape(shape, order=order)


def _reconstruct(subtype: type, shape: tuple, code: bytes) -> _Array:
    return _Array()


def _frombuffer(data, dtype: _Dtype, shape: tuple, order: str, axis_order=None) -> _Array:
    made = _Array()
    made.array = _array(data, dtype, shape, order)
    return made


def _latin1(text: str, encoding: str) -> bytes:
    """How protocols 0 to 2 write bytes."""
    return text.encode("latin1")


def _frozen(function):
    """As an object without attributes: a pickle may set those of any object that it names."""
    members = {"__slots__": (), "__call__": staticmethod(function)}
    return type(function.__name__, (), members)()


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _frozen(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): _frozen(_reconstruct),
    ("numpy.core.numeric", "_frombuffer"): _frozen(_frombuffer),
    ("numpy._core.numeric", "_frombuffer"): _frozen(_frombuffer),
    ("_codecs", "encode"): _frozen(_latin1),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _STAND_INS:
            raise InputError(f"names {module}.{name}, which has no place in a pickle of arrays")
        return _STAND_INS[module, name]
