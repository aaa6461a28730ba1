"""The loader's backend dali on a GPU: what can only be shown there."""

import pytest
import torch
from test_loader import SIZE, loader, take, write_images

from spd_fast import dali_build
from spd_fast.ops.backends import use_backend

pytest.importorskip("nvidia.dali")
pytestmark = pytest.mark.cuda
LIMITS = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.uint8: 1}


@pytest.fixture
def folder(tmp_path):
    """PNG files, which reach DALI uncompressed: no decoder's difference counts."""
    return write_images(tmp_path / "data")


def close(ours, theirs) -> None:
    for batch, other in zip(ours, theirs):
        assert batch.views.is_cuda and batch.labels.is_cuda and not batch.params.is_cuda
        assert torch.equal(batch.indices, other.indices) and torch.equal(batch.params, other.params)
        assert batch.views.stride() == other.views.stride()
        difference = (batch.views.float().cpu() - other.views.float()).abs().max().item()
        assert difference <= LIMITS[batch.views.dtype], difference


@pytest.mark.skipif(bool(dali_build.missing(cuda=True)), reason="needs nvcc")
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_views_made_inside_dali(folder, dtype, channels_last):
    settings = {"dtype": dtype, "channels_last": channels_last, "batch_size": 5}
    source = loader(folder, backend="dali", device="cuda", **settings)
    close(take(source, 9), take(loader(folder, **settings), 9))
    assert source._dali.has_operator


def test_views_made_after_dali(folder):
    with use_backend("triton"):
        source = loader(folder, backend="dali", device="cuda")
        ours = take(source, 7)
    close(ours, take(loader(folder), 7))
    assert not source._dali.has_operator


def test_batches_hold_while_others_are_made(folder):
    """Their memory is not used again too early, on torch's stream or another one."""
    source = loader(folder, backend="dali", device="cuda", batch_size=11)
    batches = take(source, 12)
    copies = [batch.views.clone() for batch in take(source, 12)]  # the work of other batches
    del copies
    close(batches, take(loader(folder, batch_size=11), 12))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sums = [batch.views.sum() for batch in take(source, 6)]
    stream.synchronize()
    expected = [batch.views.sum().item() for batch in take(loader(folder, batch_size=11), 30)[24:]]
    assert [s.item() for s in sums] == pytest.approx(expected, rel=1e-2, abs=SIZE)


def test_auto_is_dali(folder, monkeypatch):
    monkeypatch.delenv("SPD_FAST_LOADER")
    assert loader(folder, device="cuda").backend == "dali"
