"""The 2-class models on five images of a kind, whose defects are bright squares."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spd_fast import InputError, metrics, twoclass
from spd_fast.models import load_backbone
from spd_fast.twoclass import Classifier, Training, UNet

MODELS = (Classifier, UNet)


def quick(kind, iterations: int) -> Training:
    """The loss is divided by the share of what is anomalous, which is small of the pixels."""
    lr = {Classifier: 0.02, UNet: 0.002}[kind]
    return Training(epochs=None, iterations=iterations, lr=lr, batch_size=5)


def images(n: int, seed: int = 0, size: int = 64) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    """The first half is normal: noise; the others have a square of another colour."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for i in range(n):
        image = torch.randn(3, size, size, generator=generator)
        mask = torch.zeros(size, size, dtype=torch.bool)
        if i >= n // 2:
            y, x = torch.randint(0, size - 20, (2,), generator=generator).tolist()
            mask[y : y + 20, x : x + 20] = True
            image[:, mask] += torch.tensor([2.0, -2.0, 2.0])[:, None]
        data.append((image, int(i >= n // 2), mask))
    return data


def shuffled_pixels(mask: torch.Tensor) -> torch.Tensor:
    order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(0))
    return mask.flatten()[order].view_as(mask)


def new(kind, **changes):
    return kind("resnet18", "random", **changes)


def measured(model, data) -> tuple[metrics.Metrics, metrics.Metrics]:
    maps, scores = model.score(torch.stack([image for image, _, _ in data]))
    labels = np.array([label for _, label, _ in data])
    masks = np.stack([mask for _, _, mask in data])
    by_pixel = metrics.pixel_metrics(maps.numpy(), masks)
    return metrics.image_metrics(scores.numpy(), labels), by_pixel


@pytest.mark.parametrize("kind", MODELS)
def test_few_images_are_learnt_by_heart(kind):
    data = images(5)
    model = new(kind).fit(data, quick(kind, 60))
    image, pixel = measured(model, data)
    assert image.au_pr == 1.0 and model.count == 5
    if kind is UNet:
        assert pixel.au_pr > 0.95
    other_image, other_pixel = measured(model, images(20, seed=1))
    assert other_image.au_roc > 0.9  # and it is the square that was learnt
    assert kind is Classifier or other_pixel.au_roc > 0.9


@pytest.mark.parametrize("kind", MODELS)
def test_shuffled_labels_teach_nothing(kind):
    """Half of the squares and half of the noise are called anomalous, and so are pixels anywhere.
    The same steps with true labels learn them. (A network tells squares from noise by chance, one
    way or the other, so the labels of the tests are shuffled as well.)"""
    found = {True: [], False: []}
    for seed in range(2):
        data, test = images(16, seed=seed), images(40, seed=100 + seed)
        wrong, other = (
            [(image, i % 8 // 4, shuffled_pixels(mask)) for i, (image, _, mask) in enumerate(its)]
            for its in (data, test)
        )
        for shuffled, given, tested in ((True, wrong, other), (False, data, test)):
            model = new(kind).fit(given, quick(kind, 30))
            by_image, by_pixel = measured(model, tested)
            found[shuffled].append((by_image if kind is Classifier else by_pixel).au_roc)
    assert np.mean(found[False]) > 0.9
    assert abs(np.mean(found[True]) - 0.5) < 0.25


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_is_that_of_a_plain_loop(kind):
    data, training = images(4), Training(epochs=None, iterations=2, lr=0.005, flips=False)
    model = new(kind).fit(data, training)
    torch.manual_seed(model.seed)
    network = new(kind).new_network(load_backbone("resnet18", "random", seed=0)).train()
    start = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), 0.005, 0.9, weight_decay=1e-4)
    x = torch.stack([image for image, _, _ in data])
    if kind is UNet:
        truth = torch.stack([mask for _, _, mask in data]).float()
    else:
        truth = torch.tensor([label for _, label, _ in data]).float()
    for _ in range(2):  # of all four images, in whatever order
        logits = network(x)[:, 0]
        p = torch.where(truth > 0, logits.sigmoid(), 1 - logits.sigmoid())
        alpha = torch.where(truth > 0, 0.25, 0.75)
        # Lin et al. 2017, formula 5; all batches have the same number of anomalous items
        loss = -(alpha * (1 - p) ** 2 * p.log()).sum() / truth.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Of tensors as a whole: batch norm over a few values makes much of how a sum was rounded.
    errors, changes = 0.0, 0.0
    for name, expected in network.state_dict().items():
        found = model.network.state_dict()[name].double()
        error, change = ((found - before).norm() for before in (expected, start[name]))
        assert error <= 0.15 * change, name
        if expected.is_floating_point():
            errors, changes = errors + error**2, changes + change**2
    assert errors**0.5 <= 0.01 * changes**0.5


def test_all_layers_learn_from_the_backbones_weights():
    for kind in MODELS:
        model = new(kind).fit(images(4), quick(kind, 1))
        network = model.network if kind is Classifier else model.network.encoder
        before = dict(load_backbone("resnet18", "random").named_parameters())
        for name, after in network.named_parameters():
            if not name.startswith("fc."):
                change = (after - before[name]).abs().max()
                assert 0 < change < 0.02, name  # near where it started, but not there


@pytest.mark.parametrize("kind", MODELS)
def test_an_interrupted_training_ends_as_the_other(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(twoclass, "SAVE_EVERY", 4)
    data, training = images(7), Training(epochs=3, lr=0.02, batch_size=2)
    whole = new(kind).fit(data, training)

    class Stopping(list):
        reads = 0

        def __getitem__(self, i):
            self.reads += 1
            if self.reads > 13:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    path = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        new(kind).fit(Stopping(data), training, checkpoint=path, workers=1)
    assert torch.load(path)["step"] == 4
    again = new(kind).fit(data, training, checkpoint=path)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name
    torch.save(torch.load(path), path)
    for model, its, how in (
        (new(kind), data, Training(epochs=4)),
        (new(kind, seed=1), data, training),
        (new(kind), images(7, seed=1)[:6] + data[:1], training),
        (kind("resnet34", "random"), data, training),
    ):
        with pytest.raises(InputError, match="training.pt is of a training with other settings"):
            model.fit(its, how, checkpoint=path)


def test_every_image_is_seen_once_an_epoch_and_flipped_with_its_mask():
    seen = []

    class Watched(Classifier):
        def truth(self, labels, masks):
            if isinstance(labels, torch.Tensor):  # of a batch
                seen.append((labels, masks))
            return super().truth(labels, masks)

    size = 32
    data = []
    for i in range(8):
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[i, 0] = True  # tells which image it is, and how it was flipped
        data.append((torch.randn(3, size, size), i % 2, mask))
    Watched("resnet18", "random").fit(data, Training(epochs=6, batch_size=4, lr=1e-6))
    assert len(seen) == 12
    flips = []
    for epoch in range(6):
        rows = []
        for labels, masks in seen[2 * epoch : 2 * epoch + 2]:
            y, x = masks.flatten(1).argmax(1) // size, masks.flatten(1).argmax(1) % size
            row = torch.minimum(y, size - 1 - y)
            assert (labels == row % 2).all()
            rows += row.tolist()
            flips += torch.stack([y != row, x != 0], 1).tolist()
        assert sorted(rows) == list(range(8))
    share = np.mean(flips, axis=0)
    assert ((share > 0.25) & (share < 0.75)).all()  # 48 fair coins: 3.5 standard deviations


@pytest.mark.parametrize("kind", MODELS)
def test_saved_models(kind, tmp_path):
    data = images(4)
    model = new(kind).fit(data, quick(kind, 2))
    x = torch.stack([image for image, _, _ in data])
    model.save(tmp_path / "model.pt")
    maps, scores = kind.load(tmp_path / "model.pt").score(x)
    assert torch.equal(maps, model.score(x)[0]) and torch.equal(scores, model.score(x)[1])
    other = Classifier if kind is UNet else UNet
    with pytest.raises(InputError, match=f"model.pt is not a saved {other.__name__}"):
        other.load(tmp_path / "model.pt")


def test_the_map_of_the_classifier_adds_up_to_its_logit():
    model = new(Classifier).fit(images(4), quick(Classifier, 2))
    x = torch.randn(2, 3, 64, 64)
    maps, scores = model.score(x)
    assert maps.shape == (2, 64, 64)
    plain = model.network(x)[:, 0]
    torch.testing.assert_close(scores, plain.detach(), rtol=1e-4, atol=1e-5)
    coarse = F.avg_pool2d(maps[:, None], 64)[:, 0, 0, 0]  # nearly: bilinear repeats the border
    torch.testing.assert_close(coarse, scores, rtol=0.1, atol=0.1)


def test_wrong_use():
    with pytest.raises(InputError, match="not fitted"):
        new(Classifier).score(torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="nothing to save"):
        new(UNet).save("nowhere.pt")
    with pytest.raises(InputError, match="no image to fit"):
        new(Classifier).fit([])
    for kind in MODELS:
        with pytest.raises(InputError, match="all is normal: nothing to tell apart"):
            new(kind).fit(images(8)[:3])
    with pytest.raises(InputError, match="no encoder wide_resnet50_2"):
        UNet("wide_resnet50_2", "random")
    with pytest.raises(InputError, match="preset is one of paper; got 'anomalib'"):
        new(UNet, preset="anomalib")
    model = new(Classifier).fit(images(4), quick(Classifier, 1))
    with pytest.raises(InputError, match="32 x 32 pixels, but this Classifier was fitted on 64"):
        model.score(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match="the loss of step 2 is nan"):
        new(Classifier).fit(images(4), Training(epochs=None, iterations=9, lr=1e30))


def test_a_missing_library_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(InputError, match="the U-Net needs: pip install 'spd-fast\\[paper\\]'"):
        new(UNet)
    new(Classifier)
