import json
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spd_fast import recipes
from spd_fast.datasets.folder import ImageFolder
from spd_fast.datasets.images import read_image
from spd_fast.errors import InputError
from spd_fast.loader import AHEAD, ViewLoader
from spd_fast.ops.augment_views import augment_views
from spd_fast.ops.backends import use_backend
from spd_fast.views import sample_view_params

SIZE = 16


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_images(tmp_path / "data")


def write_images(root: Path, n: int = 22) -> Path:
    rng = np.random.default_rng(0)
    for i in range(n):
        path = root / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(12, 40, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return root


def loader(data, batch_size: int = 4, spd: bool = True, **kwargs) -> ViewLoader:
    return ViewLoader(data, recipes.simsiam(spd), batch_size, size=SIZE, **{"seed": 5} | kwargs)


def take(source: ViewLoader, count: int) -> list:
    """The next `count` batches, in as many epochs as that takes; then the loader is left."""
    batches = []
    while len(batches) < count:
        for batch in source:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def assert_same(batches, others) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        for name in batch._fields:
            assert torch.equal(getattr(batch, name), getattr(other, name)), name


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("spd-fast-loader")]


def test_a_batch_is_what_the_operation_makes_of_its_indices(folder):
    data = ImageFolder(folder)
    batches = take(loader(data, batch_size=10), 3)
    assert [batch.views.shape for batch in batches] == [(4, 10, 3, SIZE, SIZE)] * 3
    for epoch, batch in zip((0, 0, 1), batches):
        images = [read_image(data.paths[i]) for i in batch.indices]
        params = sample_view_params(
            recipes.simsiam(), [i.shape[:2] for i in images], batch.indices, epoch, 5, SIZE
        )
        torch.testing.assert_close(batch.views, augment_views(images, params, SIZE))
        assert batch.labels.tolist() == [data.labels[i] for i in batch.indices]
        assert set(batch.labels.tolist()) == {0, 1}


def test_an_epoch_visits_each_sample_at_most_once_in_a_new_order(folder):
    source = loader(folder)
    assert len(source) == 5  # 22 images: two are left out
    orders = [torch.cat([batch.indices for batch in source]).tolist() for _ in range(30)]
    for order in orders:
        assert len(set(order)) == len(order) == 20
    assert len({tuple(order) for order in orders}) == 30
    assert len({order[0] for order in orders}) > 10
    assert set().union(*orders) == set(range(22))  # the two left out are not always the same
    other = torch.cat([batch.indices for batch in loader(folder, seed=6)]).tolist()
    assert other != orders[0]
    # frozen: a checkpoint must find the same order in later versions
    assert orders[0][:8] == [10, 7, 4, 14, 5, 20, 21, 16]


def test_threads_do_not_change_the_batches(folder):
    one, two, four = (
        take(loader(folder, batch_size=11, workers=workers), 5) for workers in (1, 2, 4)
    )
    assert_same(one, two)
    assert_same(one, four)


def check_two_ranks(make) -> None:
    """make(batch_size=, rank=, world_size=): a loader."""
    alone = take(make(batch_size=6), 7)
    ranks = [take(make(batch_size=3, rank=r, world_size=2), 7) for r in (0, 1)]
    for whole, first, second in zip(alone, *ranks):
        assert torch.equal(whole.views, torch.cat([first.views, second.views], dim=1))
        assert torch.equal(whole.labels, torch.cat([first.labels, second.labels]))
        assert torch.equal(whole.indices, torch.cat([first.indices, second.indices]))


def test_two_ranks_together_see_what_one_sees(folder):
    check_two_ranks(partial(loader, folder))


@pytest.mark.parametrize("done", [0, 2, 5, 7])
def test_a_state_continues_exactly(folder, done):
    expected = take(loader(folder), 12)
    first = loader(folder)
    assert_same(take(first, done), expected[:done])
    state = json.loads(json.dumps(first.state_dict()))  # plain values
    resumed = loader(folder, workers=1, seed=99)
    resumed.load_state_dict(state)
    assert_same(take(resumed, 12 - done), expected[done:])
    ranks = [loader(folder, batch_size=2, rank=r, world_size=2) for r in (0, 1)]
    for rank in ranks:
        rank.load_state_dict(state)
    following = torch.cat([take(rank, 1)[0].indices for rank in ranks])
    assert torch.equal(following, expected[done].indices)


def test_a_state_fits_its_own_data_only(folder, tmp_path):
    state = loader(folder).state_dict()
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "data")
    loader(moved).load_state_dict(state)
    (moved / "cat" / "01.png").rename(moved / "cat" / "02.png")
    with pytest.raises(InputError, match="data .* 22 images with fingerprint .* instead of 22"):
        loader(moved).load_state_dict(state)
    (moved / "cat" / "02.png").unlink()
    with pytest.raises(InputError, match="21 images with .* instead of 22"):
        loader(moved).load_state_dict(state)
    with pytest.raises(InputError, match="batch_size .* is 5, but 4 in"):
        loader(folder, batch_size=5).load_state_dict(state)


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-200])
    return str(path)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_corrupt_image_is_named_and_the_threads_end(folder, workers):
    bad = truncate(folder / "cat" / "07.png")
    with pytest.raises(InputError, match=bad):
        take(loader(folder, batch_size=11, workers=workers), 2)  # one epoch of all images
    assert loader_threads() == []


def test_bad_images_are_replaced_by_the_next_good_one(folder):
    data = ImageFolder(folder)
    bad = [3, 4, 21]  # 3 and 4 are both replaced by 5, the last by the first
    names = [truncate(data.paths[i]) for i in bad]
    source = loader(data, skip_bad_images=True)
    replaced = dict(zip(bad, (5, 5, 0)))
    plan = source._samples(0).tolist()
    batches = take(source, 10)
    for row, batch in zip(plan, batches):
        assert batch.indices.tolist() == [replaced.get(i, i) for i in row]
        assert batch.labels.tolist() == [data.labels[i] for i in batch.indices]
    assert set(source.bad_images) == set(names)
    for path, reason in source.bad_images.items():
        assert path in reason
    for workers in (1, 4):
        assert_same(take(loader(data, skip_bad_images=True, workers=workers), 10), batches)


def test_a_resumed_run_knows_the_bad_images(folder):
    bad = truncate(folder / "cat" / "07.png")
    source = loader(folder, batch_size=11, skip_bad_images=True)
    take(source, 2)  # one epoch of all images
    resumed = loader(folder, batch_size=11, skip_bad_images=True)
    resumed.load_state_dict(source.state_dict())
    assert list(resumed.bad_images) == [bad] and resumed.bad_images == source.bad_images
    strict = loader(folder, batch_size=11)
    strict.load_state_dict(source.state_dict())
    with pytest.raises(InputError, match=bad):
        take(strict, 2)


def test_only_bad_images(folder):
    for path in ImageFolder(folder).paths:
        truncate(path)
    with pytest.raises(InputError, match="none of the 22 images"):
        take(loader(folder, skip_bad_images=True), 1)
    assert loader_threads() == []


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_leaving_early_ends_the_threads(folder, error):
    source = loader(folder)
    try:
        for _ in source:
            assert loader_threads()
            if error:
                raise error
            break
    except BaseException as caught:
        assert type(caught) is error
    assert loader_threads() == []
    assert source.state_dict()["next_batch"] == 1


def test_work_ahead_is_bounded(folder, monkeypatch):
    source, started = loader(folder, batch_size=2), []
    begin = source._start
    monkeypatch.setattr(source, "_start", lambda *args: started.append(1) or begin(*args))
    for consumed, _ in enumerate(source, 1):
        assert len(started) == min(consumed + AHEAD, len(source))


def test_memory_is_used_again_once_nobody_holds_the_batch(folder):
    source = loader(folder, batch_size=2)
    held = next(iter(source)).views[1, 0]  # a part of a batch holds all of it
    before, places = held.clone(), []
    for _ in range(2):
        for batch in source:
            places.append(batch.views.data_ptr())
    # a thread may let go of what it has filled a moment after it is taken
    assert len(set(places)) <= AHEAD + 2 + source.workers < len(places)
    source.batch_size = 3
    assert next(iter(source)).views.shape[1] == 3
    assert torch.equal(held, before) and held.data_ptr() not in places


def test_the_backend_asked_for_reaches_the_threads(folder):
    native = take(loader(folder), 1)[0]
    with use_backend("reference"):
        reference = take(loader(folder), 1)[0]
    torch.testing.assert_close(native.views, reference.views, atol=1e-3, rtol=0)
    with use_backend("nothing"), pytest.raises(InputError, match="no backend 'nothing'"):
        take(loader(folder), 1)


def test_memory_order_and_dtype(folder):
    plain = take(loader(folder, channels_last=False), 1)[0].views
    last = take(loader(folder, channels_last=True), 1)[0].views
    for view in range(4):
        assert plain[view].is_contiguous()
        assert last[view].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, last)
    assert take(loader(folder, dtype=torch.uint8, spd=False), 1)[0].views.dtype == torch.uint8


def test_arguments_out_of_range(folder):
    with pytest.raises(InputError, match="a batch needs 24 images, but the data has only 22"):
        loader(folder, batch_size=12, world_size=2)
    for name in ("batch_size", "workers"):
        with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
            loader(folder, **{name: 0})
    with pytest.raises(InputError, match="auto, torch, dali; got 'tensorflow'"):
        loader(folder, backend="tensorflow")
    with pytest.raises(InputError, match="rank 2, world_size 2"):
        loader(folder, rank=2, world_size=2)
    with pytest.raises(InputError, match="seed -1"):
        loader(folder, seed=-1)
    with pytest.raises(InputError, match="device is auto, cpu or cuda, got 'tpu9'"):
        loader(folder, device="tpu9")
