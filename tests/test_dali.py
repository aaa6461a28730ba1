"""The loader's backend dali: the same batches as those that threads make, and as steady."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import write_tars, write_tfrecords
from dali_soak import threads
from PIL import Image
from pretrain_runs import config, trace
from test_loader import assert_same, check_two_ranks, loader, loader_threads, take

from spd_fast import augment_views, dali_build, recipes, sample_view_params
from spd_fast.datasets.folder import ImageFolder
from spd_fast.datasets.images import read_image
from spd_fast.errors import InputError
from spd_fast.ops.backends import use_backend
from spd_fast.pretrain import pretrain
from spd_fast.views import COLUMN, range_table

pytest.importorskip("nvidia.dali")
pytestmark = pytest.mark.skipif(bool(dali_build.missing()), reason="; ".join(dali_build.missing()))


def photograph(i: int, rng) -> tuple[Image.Image, dict]:
    """Of every kind that JPEG has, with the settings that it is saved with."""
    height, width = rng.integers(12, 60, 2)
    coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((int(width), int(height)), Image.BICUBIC)
    settings = {"quality": 85, "subsampling": i % 3, "progressive": i % 5 == 0, "comment": "c" * i}
    if i % 7 == 3:
        image = image.convert("L")
    if i % 7 == 5:
        image = image.convert("CMYK")
    if i % 7 == 6:
        settings |= {"keep_rgb": True, "subsampling": 0}
    if i % 3 == 0:
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8  # orientation
        settings["exif"] = exif
    return image, settings


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> ImageFolder:
    """24 JPEG files, a PNG, a GIF and a PNG that is called .jpg; tests that change it copy it."""
    root, rng = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
    for i in range(24):
        image, settings = photograph(i, rng)
        image.save(root / ("cat", "dog")[i % 2] / f"{i:02d}.jpg", **settings)
    pixels = Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8))
    pixels.save(root / "cat" / "alpha.png")
    pixels.convert("P").save(root / "dog" / "palette.gif".replace("gif", "webp"), "GIF")
    pixels.save(root / "dog" / "named.jpg", "PNG")
    return ImageFolder(root)


def dali(data, batch_size: int = 4, **kwargs):
    return loader(data, batch_size, **{"backend": "dali"} | kwargs)


@pytest.mark.parametrize("recipe", [recipes.simsiam(), recipes.supervised(spd=False)])
def test_the_batches_are_those_of_threads(jpegs, recipe):
    ours, theirs = dali(jpegs, batch_size=9), loader(jpegs, batch_size=9)
    ours.recipe = theirs.recipe = recipe
    assert_same(take(ours, 7), take(theirs, 7))  # two epochs and a part


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("channels_last", [True, False])
def test_dtype_and_memory_order(jpegs, dtype, channels_last):
    settings = {"dtype": dtype, "channels_last": channels_last}
    ours, theirs = take(dali(jpegs, **settings), 2), take(loader(jpegs, **settings), 2)
    assert_same(ours, theirs)
    for batch, other in zip(ours, theirs):
        assert batch.views.stride() == other.views.stride() and batch.views.dtype == dtype


def test_a_batch_keeps_its_memory_and_others_are_used_again(jpegs):
    batches = take(dali(jpegs), 12)
    copies = [batch.views.clone() for batch in take(loader(jpegs), 12)]
    assert all(torch.equal(batch.views, copy) for batch, copy in zip(batches, copies))
    assert len({batch.views.data_ptr() for batch in batches}) == 12
    del batches
    source, places = dali(jpegs), []
    for _ in range(5):
        places += [batch.views.data_ptr() for batch in source]
    assert len(set(places)) < 10 < len(places)


def test_archives_give_the_batches_of_the_folder(jpegs, tmp_path):
    expected = take(loader(jpegs, batch_size=5), 8)
    for name, write in (("tar", write_tars), ("tfrecord", write_tfrecords)):
        write(jpegs, tmp_path / name)
        assert_same(take(dali(tmp_path / name, batch_size=5), 8), expected)


def test_two_ranks_together_see_what_one_sees(jpegs):
    check_two_ranks(partial(dali, jpegs))


@pytest.mark.parametrize("done", [2, 6, 9])
def test_a_state_continues_exactly_with_other_threads_and_in_either_backend(jpegs, done):
    expected = take(dali(jpegs), 14)
    first = dali(jpegs)
    assert_same(take(first, done), expected[:done])
    state = json.loads(json.dumps(first.state_dict()))
    begun = dali(jpegs, seed=99)
    take(begun, 2)
    for resumed in (dali(jpegs, workers=1), dali(jpegs, workers=3), begun, loader(jpegs)):
        resumed.load_state_dict(state)
        assert_same(take(resumed, 14 - done), expected[done:])


def damaged(jpegs: ImageFolder, tmp_path: Path) -> tuple[ImageFolder, dict[int, str]]:
    """A copy in which some images cannot be read, and what is said of them."""
    root = tmp_path / "damaged"
    for path, label in zip(jpegs.paths, jpegs.labels):
        copy = root / jpegs.classes[label] / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    data = ImageFolder(root)
    whole = data.paths[1].read_bytes()
    faults = {1: whole[: len(whole) // 2], 2: b"", 8: b"no image", 9: whole[:40]}
    for i, content in faults.items():
        data.paths[i].write_bytes(content)
    return data, {1: "truncated", 2: "the file is empty", 8: "not an image", 9: "."}


@pytest.mark.parametrize("bad", [1, 2, 8, 9])
def test_a_bad_image_is_named_at_its_turn(jpegs, bad, tmp_path):
    data, reasons = damaged(jpegs, tmp_path)
    for i in set(reasons) - {bad}:
        data.paths[i].write_bytes(jpegs.paths[0].read_bytes())
    source, seen = dali(data, batch_size=3), 0
    with pytest.raises(InputError, match=f"cannot read image {data.paths[bad]}: .*{reasons[bad]}"):
        for _ in range(3):
            for _ in source:
                seen += 1
    order = loader(data, batch_size=3)._samples(seen // 9)
    assert bad in order[seen % 9]  # all batches before it were given
    assert loader_threads() == []


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_bad_images_are_replaced_as_threads_do(jpegs, kind, tmp_path):
    data, reasons = damaged(jpegs, tmp_path)
    if kind == "tar":
        data = write_tars(data, tmp_path / "tar", shards=2)
    ours, theirs = (
        make(data, batch_size=5, skip_bad_images=True, workers=3) for make in (dali, loader)
    )
    assert_same(take(ours, 12), take(theirs, 12))
    assert ours.bad_images == theirs.bad_images and len(ours.bad_images) == len(reasons)
    resumed = dali(data, batch_size=5, skip_bad_images=True)
    resumed.load_state_dict(ours.state_dict())
    assert_same(take(resumed, 4), take(theirs, 4))


def test_a_jpeg_that_only_we_decode_is_decoded_here(jpegs, monkeypatch, tmp_path):
    """DALI refuses JPEGs whose metadata are damaged in a way that PIL reads past."""
    data, _ = damaged(jpegs, tmp_path)
    for i in (2, 8, 9):
        data.paths[i].write_bytes(jpegs.paths[i].read_bytes())
    good = read_image(jpegs.paths[1])
    real = dali_module().read_image
    monkeypatch.setattr(
        dali_module(), "read_image", lambda path: good if path == data.paths[1] else real(path)
    )
    source = dali(data, batch_size=9)
    made, count = source._dali._new_pipeline, []
    monkeypatch.setattr(source._dali, "_new_pipeline", lambda: count.append(1) or made())
    assert_same(take(source, 9), take(loader(jpegs, batch_size=9), 9))
    assert len(count) == 2  # the pipeline was replaced once, not in every epoch


def dali_module():
    from spd_fast import dali

    return dali


def test_auto_takes_dali_once_its_operators_are_built(jpegs, monkeypatch, tmp_path):
    assert loader(jpegs).backend == "torch"  # SPD_FAST_LOADER, see conftest.py
    monkeypatch.delenv("SPD_FAST_LOADER")
    dali_build.build()
    assert loader(jpegs).backend == "dali"
    assert loader(jpegs, backend="torch").backend == "torch"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert loader(jpegs).backend == "torch" and dali(jpegs).backend == "dali"
    monkeypatch.setenv("SPD_FAST_LOADER", "dali")
    assert loader(jpegs).backend == "dali"
    monkeypatch.setattr(dali_build, "compiler", lambda: None)
    with pytest.raises(InputError, match="backend dali cannot be used: there is no C\\+\\+ comp"):
        loader(jpegs)
    monkeypatch.setenv("SPD_FAST_LOADER", "dalli")
    with pytest.raises(InputError, match="is one of auto, torch, dali; got 'dalli'"):
        loader(jpegs)


def test_pretraining_is_the_same_run(jpegs, tmp_path):
    """From the folder by threads, and from tar shards by DALI."""
    tars = write_tars(jpegs, tmp_path / "tars")
    root = os.path.commonpath(jpegs.paths)
    traces = []
    for name, data, backend in (("one", [root], "torch"), ("two", tars, "dali")):
        given = config("", tmp_path / name, loader=backend, epochs=1, max_steps=2)
        assert pretrain(replace(given, data=list(map(str, data)))) == 0
        traces.append(trace(tmp_path / name))
        assert json.loads((tmp_path / name / "run.json").read_text())["loader"] == backend
    assert traces[0] == traces[1] and len(traces[0]) == 2


def test_a_failure_that_is_not_an_image_is_told(jpegs):
    source = dali(jpegs, batch_size=9)
    source.size = 0
    with pytest.raises(RuntimeError, match="size must be the height and width"):
        take(source, 1)


def run_operators(images, places, **settings) -> list[torch.Tensor]:
    """Our operators in a pipeline of one's own."""
    from nvidia.dali import fn, pipeline_def

    dali_build.load()
    given = settings.pop("params", None)
    table = range_table(recipes.simsiam(), 16, 16)
    settings.setdefault("size", [16, 16])

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=None, prefetch_queue_depth=1)
    def pipeline():
        x = fn.external_source(lambda: images, layout="HWC")
        place = fn.external_source(lambda: places)
        params = fn.spd.sample_view_params(
            x, place, ranges=" ".join(map(repr, table.ravel().tolist())), size=[16, 16]
        )
        if given is not None:
            params = fn.external_source(lambda: given.numpy())  # of tensors DALI asks torch's GPU
        return fn.spd.augment_views(x, params, **settings), params

    return [torch.from_dlpack(out.as_tensor()) for out in pipeline().run()]


def some_images() -> tuple[list[np.ndarray], np.ndarray]:
    """And their places: seed, epoch, index."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((30, 20), (5, 9))]
    return images, np.array([[7, 3, 11], [2**40, 0, 2**33]])


def test_the_operators_in_a_pipeline_of_ones_own():
    images, places = some_images()
    views, params = run_operators(images, places)
    for i, (seed, epoch, index) in enumerate(places.tolist()):
        size = images[i].shape[:2]
        rows = sample_view_params(recipes.simsiam(), [size], [index], epoch, seed, 16)
        assert torch.equal(params[i], rows[0])
        assert torch.equal(views[i], augment_views([images[i]], rows, 16)[:, 0])
    for settings in ({"channels_last": True}, {"views_first": True}):
        others, _ = run_operators(images, places, **settings)
        if "channels_last" in settings:
            others = others.permute(0, 1, 4, 2, 3)
        else:
            others = others.view(4, 2, 3, 16, 16).transpose(0, 1)
        assert torch.equal(others, views)


def test_the_operators_refuse_what_they_cannot_take():
    images, places = some_images()
    _, params = run_operators(images, places)
    outside = params.clone()
    outside[1, 2, COLUMN["crop_top"]] = 15
    circle = params.clone()
    circle[0, 0, COLUMN["source"]] = 2
    for match, given in {
        "parameters of image 1 of the batch are not valid": {"params": outside},
        "parameters of image 0 of the batch are not valid": {"params": circle},
        "params must be .views, 27.": {"params": params[..., :20].contiguous()},
        "params must be float32": {"params": params.double()},
        "dtype is one of float32.* got int8": {"dtype": "int8"},
        "std must be above 0": {"std": [0.0, 1.0, 1.0]},
        "size must be": {"size": [0, 16]},
    }.items():
        with pytest.raises(RuntimeError, match=match):
            run_operators(images, places, **given)
    with pytest.raises(RuntimeError, match="images must be uint8"):
        run_operators([image.astype(np.float32) for image in images], places)
    with pytest.raises(RuntimeError, match="places must be int64"):
        run_operators(images, places[:, :2].copy())


def test_two_iterations_of_one_loader_do_not_meet(jpegs):
    expected = take(loader(jpegs), 3)
    source = dali(jpegs)
    first = iter(source)
    batches = [next(first)]
    second = iter(source)  # from where the loader stands
    batches += [next(second)]
    assert_same(batches + [next(second)], expected)
    assert torch.equal(next(first).views, expected[1].views)
    first.close()
    assert torch.equal(next(second).views, take(loader(jpegs), 4)[3].views)


@pytest.mark.parametrize("error", [None, ValueError])
def test_leaving_early_ends_threads_and_goes_on(jpegs, error):
    source = dali(jpegs)
    before = threads()
    try:
        for _ in source:
            if error:
                raise error
            break
    except ValueError:
        pass
    assert loader_threads() == [] and threads() == before
    assert source.state_dict()["next_batch"] == 1
    assert_same(take(source, 8), take(loader(jpegs), 9)[1:])


def test_no_thread_stays_behind_a_loader(jpegs):
    take(dali(jpegs), 1)
    before = threads()
    for _ in range(3):
        take(dali(jpegs, workers=3), 7)
    assert threads() == before and threading.active_count() < 20


def test_the_views_may_be_made_after_dali(jpegs):
    """As on a GPU without a compiler; which backend makes them can then be chosen."""
    source = dali(jpegs)
    with use_backend("reference"):
        expected = take(loader(jpegs), 2)
        ours = take(source, 2)
        assert_same(ours, expected)
    assert not source._dali.has_operator
    assert_same(take(source, 1), take(loader(jpegs), 3)[2:])
    assert source._dali.has_operator
    with use_backend("nothing"), pytest.raises(InputError, match="no backend 'nothing'"):
        take(dali(jpegs), 1)


CHILD = """
import os, sys
from spd_fast import recipes
from spd_fast.errors import InputError
from spd_fast.loader import ViewLoader

def make():
    return ViewLoader({root!r}, recipes.simsiam(), 4, size=16, seed=5, backend={backend!r})

loader = make()
begun = iter(loader)
next(begun)
child = os.fork()
if child == 0:
    try:
        next(begun)
    except InputError as error:
        print("refused:", error)
    first = next(iter(loader)).indices.tolist()
    print("child", first)
    print("new", next(iter(make())).indices.tolist())
    sys.exit(3)
status = os.waitpid(child, 0)[1]
print("parent", next(begun).indices.tolist(), os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_forked_child_does_not_hang(jpegs, backend):
    root = str(Path(os.path.commonpath(jpegs.paths)))
    code = CHILD.format(root=root, backend=backend)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    expected = [batch.indices.tolist() for batch in take(loader(jpegs), 2)]
    assert done.stdout.splitlines() == [
        "refused: batches cannot be taken on in a forked child: iterate anew",
        f"child {expected[1]}",
        f"new {expected[0]}",
        f"parent {expected[1]} 3",
    ]
