import numpy as np
import pytest
import torch
from lightly.utils.lars import LARS as LightlyLARS

from spd_fast.methods import MoCo, SimSiam
from spd_fast.optim import LARS, new_optimizer, scheduled_lr


def weights(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (5, 4), (3, 2, 3, 3), (7,)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def with_gradients(parameters, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def test_lars_equals_numpy():
    """With changing rates, which stand inside the momentum."""
    ours = weights()
    optimizer = LARS(ours, lr=1.0, momentum=0.9, weight_decay=0.1, trust=0.01)
    w = [p.detach().double().numpy().copy() for p in ours]
    v = [np.zeros_like(x) for x in w]
    for step in range(4):
        with_gradients(ours, step)
        optimizer.param_groups[0]["lr"] = rate = 1 / (1 + step)
        optimizer.step()
        for i, p in enumerate(ours):
            g, scale = p.grad.double().numpy(), 1.0
            if g.ndim > 1:
                g = g + 0.1 * w[i]
                scale = 0.01 * np.linalg.norm(w[i]) / np.linalg.norm(g)
            v[i] = 0.9 * v[i] + rate * scale * g
            w[i] = w[i] - v[i]
            np.testing.assert_allclose(p.detach().numpy(), w[i], rtol=1e-5, atol=1e-6)


def test_lars_equals_lightlys_where_both_are_the_same():
    """At a constant rate and next to no decay; lightly tells by the decay what to scale."""
    ours, theirs = weights()[:2], weights()[:2]
    optimizers = [
        LARS(ours, lr=0.5, weight_decay=1e-12),
        LightlyLARS(theirs, lr=0.5, momentum=0.9, weight_decay=1e-12),
    ]
    for step in range(5):
        for parameters, optimizer in zip((ours, theirs), optimizers):
            with_gradients(parameters, step)
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lars_of_weights_or_gradients_of_zero():
    zero = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([zero], lr=0.1)
    zero.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(zero, torch.full((2, 2), -0.1))
    zero.grad = torch.zeros(2, 2)
    optimizer.step()
    assert zero.isfinite().all()


def test_every_parameter_that_learns_is_optimised_once():
    for method in (SimSiam("resnet18", 32, 8), MoCo("resnet18", 16, queue_size=8)):
        optimizer = new_optimizer("sgd", method, 0.1, 0.9, 1e-4)
        groups = {g["fixed_lr"]: g["params"] for g in optimizer.param_groups}
        assert set(groups.get(True, [])) == set(method.fixed_rate_parameters())
        held = [p for params in groups.values() for p in params]
        assert len(held) == len(set(held))
        assert set(held) == {p for p in method.parameters() if p.requires_grad}
    assert isinstance(new_optimizer("lars", method, 0.1, 0.9, 1e-4), LARS)


@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine_equals_torchs(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20 - warmup)
    for step in range(warmup, 20):
        ours = scheduled_lr("cosine", 2.0, step, 20, warmup)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
    assert [scheduled_lr("cosine", 2.0, s, 20, 4) for s in range(4)] == [0, 0.5, 1, 1.5]


def test_steps_fall_after_each_third():
    rates = [scheduled_lr("steps", 1.0, step, 90) for step in (0, 29, 30, 59, 60, 89)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
