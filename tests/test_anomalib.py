import copy
import gc
import io
import pickle
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch

from spd_fast import InputError
from spd_fast.datasets.synthetic import write_synthetic_visa

pytest.importorskip("anomalib", reason="anomalib is optional")
from anomalib.data import InferenceBatch, Visa
from anomalib.data.utils.tiler import Tiler
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.models.image.padim.torch_model import PadimModel

from spd_fast.integrations.anomalib import (
    FastPadimModel,
    StreamingPadim,
    _nearest_is_exact,
    accelerate,
)

SIZE = 96  # pixels; a grid of 24 x 24


@pytest.fixture(scope="module")
def visa(tmp_path_factory):
    """A synthetic category under a name that anomalib knows."""
    root = tmp_path_factory.mktemp("visa")
    write_synthetic_visa(root, size=(128, 102), n_normal=20, n_anomaly=5, categories=["gelcaps"])
    shutil.move(root / "gelcaps", root / "capsules")
    for file in (root / "split_csv").iterdir():
        file.write_text(file.read_text().replace("gelcaps", "capsules"))
    return Visa(root, "capsules", train_batch_size=5, eval_batch_size=4, num_workers=0)


@pytest.fixture
def new_engine(tmp_path):
    """A new one per model: an Engine keeps its Trainer, which does not fit a second time."""
    warnings.simplefilter("ignore")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lambda: Engine(default_root_dir=tmp_path, accelerator="cpu", **quiet)


def make(cls=Padim, **kwargs):
    torch.manual_seed(0)  # of the backbone's weights and the kept channels
    return cls(
        pre_trained=False,
        n_features=40,
        pre_processor=Padim.configure_pre_processor((SIZE, SIZE)),
        visualizer=False,
        **kwargs,
    )


def fitted_model(size=(64, 64), layers=("layer1", "layer2", "layer3"), d=30, n=8, **kwargs):
    """A PadimModel fitted by anomalib to smooth random images, and test images."""
    torch.manual_seed(0)
    model = PadimModel(layers=list(layers), pre_trained=False, n_features=d, **kwargs)
    images = torch.nn.functional.interpolate(torch.randn(n, 3, 16, 16), size, mode="bicubic")
    if "tiler" not in kwargs:
        model.train()
    model(images)
    model.fit()
    return model.eval(), images[:3] + 0.3 * torch.randn(3, 3, *size)


def flat(batches, name):
    return torch.cat([getattr(batch, name).flatten() for batch in batches])


def assert_same(ours: InferenceBatch, theirs: InferenceBatch, rtol=1e-3):
    assert type(ours) is InferenceBatch
    for a, b in zip(ours[:3:2], theirs[:3:2]):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=0)


def test_engine_gives_the_same_scores_and_metrics(visa, new_engine):
    engine, plain = new_engine(), make()
    engine.fit(plain, datamodule=visa)
    expected_metrics = engine.test(plain, datamodule=visa, verbose=False)
    expected = engine.predict(plain, datamodule=visa)
    fast = accelerate(copy.deepcopy(plain))
    streamed = make(StreamingPadim)
    new_engine().fit(streamed, datamodule=visa)
    assert isinstance(fast, Padim) and isinstance(fast.model, PadimModel)
    for model in (fast, streamed):
        assert not model.model.memory_bank and model.model.idx.equal(plain.model.idx)
        (ours,), (theirs,) = engine.test(model, datamodule=visa, verbose=False), expected_metrics
        assert ours.keys() == theirs.keys() and len(ours) >= 4
        assert ours == pytest.approx(theirs, abs=1e-3)
        predicted = engine.predict(model, datamodule=visa)
        for name in ("anomaly_map", "pred_score"):  # normalised by the post-processor, to [0, 1]
            ours, theirs = flat(predicted, name), flat(expected, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert flat(predicted, "pred_label").equal(flat(expected, "pred_label"))


@pytest.mark.parametrize("factor_dtype", ["float32", "float16", "int8"])
def test_what_has_the_threshold_score_stays_normal(factor_dtype):
    module, images = fitted_model()
    scores = module(images).pred_score
    for image, score in zip(images, scores):
        padim = make()
        padim.model = copy.deepcopy(module)
        padim.post_processor._image_threshold.copy_(score[0])
        fast = accelerate(padim, factor_dtype)
        threshold = fast.post_processor._image_threshold.clone()
        assert score < threshold <= 1.0101 * score
        assert fast.model(image[None]).pred_score <= threshold
        assert fast.post_processor._pixel_threshold.isnan()  # not validated yet
        accelerate(fast, "float32")  # raised once, but more for a coarser factor
        assert fast.post_processor._image_threshold == threshold
        accelerate(fast, "int8")
        assert fast.post_processor._image_threshold > 1.009 * score


def test_checkpoints(visa, new_engine):
    engine = new_engine()
    streamed = make(StreamingPadim, factor_dtype="float16")
    engine.fit(streamed, datamodule=visa)
    path = engine.best_model_path
    state = torch.load(path, weights_only=False)["state_dict"]
    assert state["model.factor"].dtype == torch.float16 and "model.gaussian.mean" not in state
    loaded = StreamingPadim.load_from_checkpoint(path, pre_trained=False, visualizer=False)
    image = torch.rand(2, 3, SIZE, SIZE)
    expected = streamed.eval().model(image)
    assert_same(loaded.eval().model(image), expected, rtol=0)
    before = engine.test(streamed, datamodule=visa, verbose=False)
    assert engine.test(loaded, datamodule=visa, ckpt_path=path, verbose=False) == before
    plain = make()
    plain.load_state_dict(accelerate(loaded).state_dict())
    assert_same(expected, plain.eval().model(image))
    assert len(plain.state_dict()) == len(make().state_dict())


@pytest.mark.parametrize(
    "factor_dtype, rtol", [("float32", 1e-4), ("float16", 3e-3), ("int8", 1e-2)]
)
@pytest.mark.parametrize(
    "size, layers",
    [
        ((64, 64), ("layer1", "layer2", "layer3")),
        ((65, 91), ("layer1", "layer2", "layer3")),  # odd grids
        ((64, 48), ("layer2",)),
        ((64, 64), ("layer1", "layer3")),
        ((64, 64), ("layer2", "layer1")),  # the finest is not the first
    ],
)
def test_model_equals_anomalibs(size, layers, factor_dtype, rtol):
    theirs, images = fitted_model(size, layers)
    ours = accelerate(theirs, factor_dtype)
    assert isinstance(ours, PadimModel) and type(theirs) is PadimModel
    assert ours.factor.dtype == getattr(torch, factor_dtype)
    assert_same(ours(images), theirs(images), rtol)


def test_layers_that_torch_replicates_unevenly():
    # nearest in torch reads another row for these sizes; found by trying all
    assert not _nearest_is_exact(16, 122) and _nearest_is_exact(14, 56)
    theirs, images = fitted_model((488, 32), ("layer1", "layer4"), d=20)
    ours = accelerate(theirs)
    assert theirs.feature_extractor(images)["layer4"].shape[2] == 16
    assert len(ours.layers_and_channels(images)[0]) == 1
    assert_same(ours(images), theirs(images), 1e-4)


def test_other_backbone_and_smoothing():
    theirs, images = fitted_model(
        backbone="mobilenetv3_small_050", layers=("blocks.1", "blocks.3"), d=20
    )
    theirs.anomaly_map_generator = type(theirs.anomaly_map_generator)(sigma=2)
    ours = accelerate(theirs)
    assert ours.sigma == pytest.approx(2, abs=1e-4) and ours.radius == 8
    assert_same(ours(images), theirs(images), 1e-4)


def test_tiles():
    torch.manual_seed(0)
    theirs = PadimModel(pre_trained=False, n_features=20)
    theirs.tiler = Tiler(tile_size=64, stride=64)
    images = torch.rand(6, 3, 128, 128)
    theirs.train()(images)
    theirs.fit()
    ours = FastPadimModel(theirs)
    assert_same(ours.eval()(images), theirs.eval()(images), 1e-4)
    again = FastPadimModel(PadimModel(pre_trained=False, n_features=20))
    again.tiler, again.idx, again.feature_extractor = ours.tiler, ours.idx, ours.feature_extractor
    again.update(images[:2])
    again.update(images[2:])
    again.fit()
    assert_same(again.eval()(images), theirs(images))


def test_state_dict_is_anomalibs():
    theirs, images = fitted_model()
    ours = accelerate(theirs)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    inverse = "gaussian.inv_covariance"
    torch.testing.assert_close(state[inverse], expected[inverse], rtol=1e-3, atol=1e-3)
    plain = PadimModel(pre_trained=False, n_features=30)
    plain.load_state_dict(state)
    assert_same(plain.eval()(images), theirs(images), 1e-4)
    fresh = FastPadimModel(PadimModel(pre_trained=False, n_features=30)).eval()
    fresh.load_state_dict(expected)
    assert_same(fresh(images), theirs(images), 1e-4)
    assert set(expected) == set(theirs.state_dict())  # loading leaves the given one as it was
    unfitted = FastPadimModel(PadimModel(pre_trained=False, n_features=30)).state_dict()
    assert unfitted[inverse].numel() == 0


def test_memory_order():
    """Channels-last inside, whatever the order of the images; outside as anomalib has it."""
    plain, images = fitted_model()
    fast = accelerate(plain)
    for layer in fast.layers_and_channels(images)[0]:
        assert layer.is_contiguous(memory_format=torch.channels_last)
    assert all(tensor.is_contiguous() for tensor in fast.state_dict(prefix="x.").values())
    expected = fast(images)
    found = fast(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-4)


def test_copies_and_files():
    theirs, images = fitted_model()
    ours = accelerate(theirs)
    expected = ours(images)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ):
        assert_same(other(images), expected, rtol=0)
    for dtype in ("float16", "int8"):  # what a model of another dtype has saved is converted
        other = FastPadimModel(PadimModel(pre_trained=False, n_features=30), dtype, True).eval()
        ours.packed_state = True
        other.load_state_dict(ours.state_dict())
        ours.packed_state = False
        assert str(other.factor.dtype) == f"torch.{dtype}"
        assert_same(other(images), expected, rtol=1e-2)
        back = FastPadimModel(PadimModel(pre_trained=False, n_features=30)).eval()
        back.load_state_dict(other.state_dict())
        assert_same(back(images), other(images), rtol=1e-4)
    half = accelerate(ours, "float16")
    half.load_state_dict(half.state_dict())
    assert half.factor.dtype == torch.float16
    assert_same(half(images), expected, rtol=3e-3)


def test_the_given_model_is_left_as_it_was():
    theirs, images = fitted_model()
    before = theirs(images)
    other = accelerate(theirs)
    other.load_state_dict(fitted_model(n=5)[0].state_dict())
    other.feature_extractor = None
    assert_same(theirs(images), before, rtol=1e-5)


def test_memory_of_the_fit_does_not_grow():
    model = FastPadimModel(PadimModel(pre_trained=False, n_features=10))
    images = torch.rand(4, 3, 64, 64)
    model.update(images)
    after_one = {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}
    for _ in range(3):
        model.update(images)
    gc.collect()
    kept = [x for x in gc.get_objects() if type(x) is torch.Tensor and id(x) not in after_one]
    assert not kept and not model.memory_bank and model.running[0] == 16


def test_a_fit_begun_anew_forgets_the_images_of_the_last():
    model = StreamingPadim(pre_trained=False, n_features=10)
    for _ in range(2):  # the first is broken off
        model.on_train_start()
        model.training_step(SimpleNamespace(image=torch.rand(3, 3, 64, 64)))
    assert model.model.running[0] == 3


def test_wrong_use():
    unfitted = PadimModel(pre_trained=False, n_features=10)
    with pytest.raises(InputError, match="not fitted: run Engine.fit"):
        accelerate(unfitted)
    with pytest.raises(InputError, match="not fitted: run Engine.fit"):
        accelerate(make())
    with pytest.raises(InputError, match="expected a fitted anomalib Padim .* got Linear"):
        accelerate(torch.nn.Linear(2, 2))
    theirs, images = fitted_model()
    with pytest.raises(InputError, match="factor_dtype is float32, .*, int8; got 'int4'"):
        accelerate(theirs, "int4")
    ours = accelerate(theirs)
    with pytest.raises(InputError, match="only scores"):
        ours.train()(images)
    with pytest.raises(InputError, match="32 x 64 pixels, .* layer1 makes 128 .* with 256"):
        ours.eval()(images[:, :, :32])
    streaming = FastPadimModel(unfitted)
    with pytest.raises(InputError, match="at least 2 images.*got 0"):
        streaming.fit()
    streaming.update(images[:1])
    with pytest.raises(InputError, match="at least 2 images.*got 1"):
        streaming.fit()
    theirs.gaussian.inv_covariance[3] = -torch.eye(30)
    with pytest.raises(InputError, match="not positive definite"):
        accelerate(theirs)
