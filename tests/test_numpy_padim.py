import pickle
import random

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from spd_fast import InputError, PaDiM
from spd_fast.integrations.numpy_padim import _STAND_INS, read_numpy_padim


def as_it_fits(path, d=20, n=10, protocol=4, size=64):
    """Fit as the numpy re-implementation does; returns its own distances for test images too."""
    torch.manual_seed(0)
    network = PaDiM(weights="random", n_features=d)
    images = torch.nn.functional.interpolate(torch.randn(n + 2, 3, 16, 16), size)
    layers = network.features(images)
    grid = layers[0].shape[2:]
    whole = torch.cat([torch.nn.functional.interpolate(layer, grid) for layer in layers], 1)
    random.seed(1024)
    idx = random.sample(range(whole.shape[1]), d)
    vectors = whole[:, idx].flatten(2).numpy()
    mean = vectors[:n].mean(0)
    covariance = np.zeros((d, d, mean.shape[1]), dtype=np.float32)
    for i in range(mean.shape[1]):
        covariance[:, :, i] = np.cov(vectors[:n, :, i], rowvar=False) + 0.01 * np.identity(d)
    path.write_bytes(pickle.dumps([mean, covariance], protocol))
    inverse = [np.linalg.inv(covariance[:, :, i].astype(float)) for i in range(mean.shape[1])]
    distances = [
        [mahalanobis(v[:, i], mean[:, i], inverse[i]) for i in range(mean.shape[1])]
        for v in vectors[n:]
    ]
    return images[n:], np.array(distances).reshape(2, *grid)


@pytest.mark.parametrize("protocol", range(6))
def test_scores_as_it_does(tmp_path, protocol):
    images, distances = as_it_fits(tmp_path / "train.pkl", protocol=protocol)
    state = random.getstate()
    model = read_numpy_padim(tmp_path / "train.pkl", weights="random")
    assert random.getstate() == state
    maps, scores = model.score(images)
    upsampled = torch.nn.functional.interpolate(
        torch.from_numpy(distances)[:, None], (64, 64), mode="bilinear", align_corners=False
    )
    from scipy.ndimage import gaussian_filter

    for ours, theirs in zip(maps.numpy(), upsampled[:, 0].numpy()):
        np.testing.assert_allclose(ours, gaussian_filter(theirs, 4), rtol=1e-3)
    assert torch.equal(scores, maps.amax((1, 2)))
    model.save(tmp_path / "padim.pt")
    assert torch.equal(PaDiM.load(tmp_path / "padim.pt").score(images)[0], maps)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_in_the_file_is_executed(tmp_path):
    path, mark = tmp_path / "train.pkl", tmp_path / "mark"
    mean, covariance = np.ones((2, 4), np.float32), np.ones((2, 2, 4), np.float32)
    for evil, name in (
        (Evil(open, str(mark), "w"), "io.open"),
        (Evil(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
        (Evil(__import__("os").system, f"touch {mark}"), "posix.system"),
        (Evil(np.load, str(mark)), "numpy.load"),
        (np.float32(1), r"numpy\..*multiarray.scalar"),
    ):
        for pair in ([mean, evil], [evil, covariance], evil):
            path.write_bytes(pickle.dumps(pair))
            with pytest.raises(InputError, match=f"train.pkl names {name}"):
                read_numpy_padim(path)
    assert not mark.exists()


def test_files_that_are_no_such_model(tmp_path):
    path = tmp_path / "train.pkl"
    as_it_fits(path, d=4, n=5)
    whole = path.read_bytes()
    mean, covariance = pickle.loads(whole)

    def refused(content, message, **kwargs):
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        with pytest.raises(InputError, match=message):
            read_numpy_padim(path, weights="random", **kwargs)

    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        refused(whole[:length], "train.pkl is truncated")
    refused(b"PK\x03\x04 not a pickle", "is truncated or not a pickle")
    refused([mean, np.array([{}, []], dtype=object)], "array of type 'O8', expected f4 or f8")
    refused([mean, np.ones(3, dtype=np.int64)], "array of type 'i8'")
    refused({"mean": mean}, "holds a dict, expected")
    refused([mean, None], r"holds \[Array, NoneType\], expected two arrays")
    refused([mean, covariance[:3]], r"\(4, 256\) and \(3, 4, 256\), expected a mean")
    refused([mean[:, :255], covariance[:, :, :255]], "255 positions, expected a square grid")
    refused([mean * np.nan, covariance], "NaN or infinite")
    refused([mean, -covariance], "not positive definite")
    refused([mean, covariance], "unknown backbone|backbone", backbone="resnet19")
    many = np.ones((449, 1), np.float32), np.ones((449, 449, 1), np.float32)
    refused(list(many), r"1\.\.448 for resnet18, got 449")
    with pytest.raises(InputError, match="cannot read .*missing.pkl: No such file"):
        read_numpy_padim(tmp_path / "missing.pkl")


def test_flags_of_a_dtype_are_not_believed(tmp_path):
    # Told by its state that floats are pointers to objects, numpy would follow them.
    array = np.arange(4, dtype=np.float32)
    content = pickle.dumps([array, array], 2)
    reconstruct, arguments, state = array.__reduce__()
    version, names = state[2].__reduce__()[2][:2]
    assert b"dtype" in content and version == 3 and names == "<"

    class Flagged:
        def __reduce__(self):
            return np.dtype, ("f4", False, True), (3, "<", None, None, None, -1, -1, 63)

    class Holder:
        def __reduce__(self):
            return reconstruct, arguments, (1, (4,), Flagged(), False, array.tobytes())

    (tmp_path / "train.pkl").write_bytes(pickle.dumps([Holder(), Holder()]))
    with pytest.raises(InputError, match=r"shapes \(4,\) and \(4,\)"):
        read_numpy_padim(tmp_path / "train.pkl")


@pytest.mark.parametrize("name", [b"numpy._core.numeric\n_frombuffer", b"numpy\ndtype"])
def test_a_file_cannot_change_the_reader(tmp_path, name):
    before = [vars(x).copy() if hasattr(x, "__dict__") else () for x in _STAND_INS.values()]
    state = b"N}(X\x0c\x00\x00\x00__defaults__)u\x86"  # (None, {"__defaults__": ()})
    (tmp_path / "bad.pkl").write_bytes(b"\x80\x02c" + name + b"\n" + state + b"b.")
    with pytest.raises(InputError, match="bad.pkl is truncated or not a pickle"):
        read_numpy_padim(tmp_path / "bad.pkl", weights="random")
    after = [vars(x).copy() if hasattr(x, "__dict__") else () for x in _STAND_INS.values()]
    assert before == after
