import copy

import pytest
import torch
import torch.nn.functional as F
from lightly.models.modules.heads import (
    MoCoProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
)
from lightly.models.utils import update_momentum

from spd_fast.losses import moco_loss, nt_xent, simsiam_loss
from spd_fast.methods import MoCo, SimCLR, SimSiam, Supervised
from spd_fast.models import new_backbone

LABELS = torch.arange(8) % 3


def views(count: int, n: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    """As in a step of training."""
    model.before_step()
    return model.loss(model.encode(x), x, LABELS)


def project(model, x):
    return model.projector(model.features(x))


def small_moco(**kwargs) -> MoCo:
    torch.manual_seed(0)
    return MoCo("resnet18", dim=16, queue_size=20, **{"bn_group": 4} | kwargs)


# ------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: SimSiam().projector, lambda: SimSiamProjectionHead(2048, 2048, 2048)),
        (lambda: SimSiam().predictor, lambda: SimSiamPredictionHead(2048, 512, 2048)),
        (lambda: MoCo(queue_size=8).projector, lambda: MoCoProjectionHead(2048, 2048, 128)),
        (lambda: SimCLR().projector, lambda: SimCLRProjectionHead(2048, 2048, 128, num_layers=3)),
    ],
    ids=["SimSiam's projector", "SimSiam's predictor", "MoCo", "SimCLR"],
)
def test_heads_equal_lightlys(ours, theirs):
    """Official sizes for ResNet-50."""
    ours, theirs = ours(), theirs()
    theirs.layers.load_state_dict(ours.state_dict())  # strict: the same layers, the same sizes
    x = torch.randn(8, 2048, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_hidden_width_is_that_of_the_features():
    sizes = [tuple(p.shape) for p in SimSiam("resnet18", 64, 16).projector.parameters()]
    assert sizes == [(512, 512), (512,), (512,), (512, 512), (512,), (512,), (64, 512)]


def test_residual_branches_start_at_zero():
    """Those of SimSiam and SimCLR."""
    for model in (SimSiam("resnet18", 32, 8), SimCLR("resnet18", 16)):
        for block in (*model.backbone.layer1, *model.backbone.layer4):
            assert not block.bn2.weight.any()
    for other in (new_backbone("resnet18"), small_moco().backbone):
        assert other.layer1[0].bn2.weight.all()


# ----------------------------------------------------------------------------------------- SimSiam


def test_simsiam():
    model = SimSiam("resnet18", 32, 8)
    x = views(2)
    loss, z = loss_of(model, x)
    z_hat = project(model, x[1])
    # the last batch norm has no scale and shift: every dimension has mean 0 and deviation 1
    torch.testing.assert_close(z.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(32), atol=1e-2, rtol=0)
    expected = simsiam_loss(model.predictor(z), model.predictor(z_hat), z, z_hat)
    torch.testing.assert_close(loss, expected)
    assert set(model.fixed_rate_parameters()) == set(model.predictor.parameters())


# -------------------------------------------------------------------------------------------- MoCo


def test_moco_loss_and_queue():
    model, x = small_moco(), views(2)
    before = copy.deepcopy(model)
    loss, z = loss_of(model, x)
    assert (before.queue.norm(dim=1) - 1).abs().max() < 1e-6
    keys = copy.deepcopy(before)._keys(x[1])
    torch.testing.assert_close(loss, moco_loss(z, keys, before.queue, 0.2))
    assert (keys.norm(dim=1) - 1).abs().max() < 1e-6
    assert torch.equal(model.queue[:8], keys) and torch.equal(model.queue[8:], before.queue[8:])
    loss.backward()  # the queue that the loss saw was not changed
    loss_of(model, x)
    third = copy.deepcopy(model)._keys(x[0])
    loss_of(model, x.flip(0))  # 24 keys in a queue of 20: the first four go
    assert torch.equal(model.queue[16:], third[:4]) and torch.equal(model.queue[:4], third[4:])
    assert model.next_row == 4


def test_moco_keys_follow_slowly_and_do_not_learn():
    model, x = small_moco(key_momentum=0.9), views(2)
    with torch.no_grad():
        for p in (*model.backbone.parameters(), *model.projector.parameters()):
            p.add_(1)
    theirs = copy.deepcopy(model)
    loss, _ = loss_of(model, x)
    loss.backward()
    for part in ("backbone", "projector"):
        query, key = getattr(theirs, part), getattr(theirs, f"key_{part}")
        update_momentum(query, key, 0.9)
        moved = getattr(model, f"key_{part}").parameters()
        for ours, expected in zip(moved, key.parameters()):
            torch.testing.assert_close(ours, expected)
            assert ours.grad is None
        assert all(p.grad is not None for p in getattr(model, part).parameters())


def test_moco_normalises_query_and_key_with_different_images():
    model, x = small_moco().eval(), views(1)[0]
    exact = project(model, x)  # nothing is normalised by the batch
    torch.testing.assert_close(model._keys(x), F.normalize(exact, dim=1), rtol=1e-4, atol=1e-5)
    model.train()
    backbone = copy.deepcopy(model.backbone)
    queries = torch.cat([backbone(x[:4]), backbone(x[4:])])
    torch.testing.assert_close(project(model, x), model.projector(queries))
    keys = torch.stack([backbone(x[0::2]), backbone(x[1::2])], 1).flatten(0, 1)
    expected = F.normalize(model.projector(keys), dim=1)
    torch.testing.assert_close(model._keys(x), expected, rtol=1e-3, atol=1e-4)
    assert (F.normalize(project(model, x), dim=1) - model._keys(x)).abs().max() > 1e-2
    # never one group, and batches that do not divide
    assert [small_moco(bn_group=32)._groups(n) for n in (8, 64, 100)] == [2, 2, 3]
    assert model._keys(torch.cat([x, x[:3]])).shape == (11, 16)


def test_moco_moves_running_statistics_once_per_view():
    model, x = small_moco(), views(1, 4)[0]
    once = copy.deepcopy(model.backbone)
    once(x)
    project(model, torch.cat([x, x]))  # two groups of the same images
    name = "layer1.0.bn1.running_mean"
    moved, expected = model.backbone.state_dict()[name], once.state_dict()[name]
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 0
    model.features(torch.cat([x, x]))  # in groups as well
    once(x)
    expected = once.state_dict()[name]
    torch.testing.assert_close(model.backbone.state_dict()[name], expected, rtol=1e-4, atol=1e-6)


def test_the_spd_classifier_changes_no_other_weight():
    for cls, arguments in ((SimSiam, ("resnet18", 32, 8)), (Supervised, ("resnet18", 3))):
        with_it, without = ((torch.manual_seed(0), cls(*arguments))[1] for _ in range(2))
        with_it.add_spd_classifier()
        for name, value in without.state_dict().items():
            assert torch.equal(with_it.state_dict()[name], value), name


def test_moco_starts_both_encoders_from_given_weights():
    model, given = small_moco(), new_backbone("resnet18")
    model.start_from(given)
    for encoder in (model.backbone, model.key_backbone):
        assert torch.equal(encoder.conv1.weight, given.conv1.weight)
    assert not [name for name, _ in model.backbone.named_parameters() if name.startswith("fc.")]


# ------------------------------------------------------------------------------ SimCLR, supervised


def test_simclr():
    model, x = SimCLR("resnet18", 16), views(2)
    loss, z = loss_of(model, x)
    both = model.projector(model.backbone(torch.cat([x[0], x[1]])))  # normalised together
    torch.testing.assert_close(loss, nt_xent(both[:8], both[8:], 0.1))
    torch.testing.assert_close(z, both[:8])
    loss.backward()
    assert model.projector[-1].bias.grad is None and not model.projector[-1].bias.any()
    assert model.fixed_rate_parameters() == []


def test_supervised():
    model, x = Supervised("resnet18", classes=3), views(1)
    loss, z = loss_of(model, x)
    share = model.classifier(z).softmax(1)[torch.arange(8), LABELS]
    torch.testing.assert_close(loss, -share.log().mean())
    assert z.shape == (8, 512)
