import numpy as np
import pytest
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from scipy.special import logsumexp, softmax
from sklearn.metrics import log_loss

from spd_fast.losses import (
    cosine,
    info_nce,
    moco_loss,
    nt_xent,
    simsiam_loss,
    spd_cross_entropy,
    spd_loss,
)


def vectors(count: int, n: int = 6, d: int = 5, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, n, d, dtype=torch.float64, generator=generator))


def test_cosine_by_hand():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[6.0, 8.0], [0.0, 5.0], [-2.0, -2.0], [1.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(cosine(a, b), torch.tensor([1.0, 0.0, -1.0, 0.5**0.5, 0.0]))


def test_simsiam_equals_lightly():
    p, p_hat, z, z_hat = vectors(4)
    criterion = NegativeCosineSimilarity()
    expected = (criterion(p, z_hat) + criterion(p_hat, z)) / 2
    torch.testing.assert_close(simsiam_loss(p, p_hat, z, z_hat), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(simsiam_loss(z_hat, z, z, z_hat).item(), -1.0)


def test_simsiam_stops_the_gradient_at_the_projections():
    p, p_hat, z, z_hat = (t.requires_grad_() for t in vectors(4))
    simsiam_loss(p, p_hat, z, z_hat).backward()
    assert z.grad is None and z_hat.grad is None
    assert p.grad.abs().min() > 0 and p_hat.grad.abs().min() > 0
    assert torch.autograd.gradcheck(lambda a, b: simsiam_loss(a, b, z, z_hat), (p, p_hat))


@pytest.mark.parametrize("n", [1, 2, 9])
def test_info_nce_is_formula_1(n):
    z, z_hat = vectors(2, n=n)
    a, b = (t.numpy() / np.linalg.norm(t, axis=1, keepdims=True) for t in (z, z_hat))
    terms = []
    for i in range(n):
        own = a[i] @ b[i] / 0.2
        others = [a[i] @ a[j] / 0.2 for j in range(n) if j != i]
        terms.append(logsumexp([own, *others]) - own)
    assert info_nce(z, z_hat, 0.2).item() == pytest.approx(np.mean(terms), rel=1e-12, abs=1e-15)
    # the length of a projection does not count
    assert info_nce(3 * z, z_hat / 7, 0.2).item() == pytest.approx(np.mean(terms), abs=1e-12)


def test_info_nce_gradient():
    z, z_hat = (t.requires_grad_() for t in vectors(2, n=4))
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, 0.5), (z, z_hat))


@pytest.mark.parametrize("n", [1, 2, 9])
def test_nt_xent_equals_lightly(n):
    z, z_hat = vectors(2, n=n)
    expected = NTXentLoss(temperature=0.1)(z, z_hat)
    torch.testing.assert_close(nt_xent(3 * z, z_hat / 7, 0.1), expected, rtol=1e-12, atol=1e-12)


def test_nt_xent_by_hand():
    """Two images; the views of each are equal, those of different ones orthogonal."""
    z = torch.eye(2, dtype=torch.float64)
    expected = -np.log(np.e**2 / (np.e**2 + 2))  # temperature 1/2, two negatives at 0
    assert nt_xent(z, z, 0.5).item() == pytest.approx(expected, rel=1e-12)


def test_moco_equals_lightly():
    queries, keys = vectors(2)
    queue = torch.nn.functional.normalize(vectors(1, n=20, seed=1)[0], dim=1)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(20, 5))
    criterion.memory_bank.bank = queue.clone()
    expected = criterion(queries, keys)
    torch.testing.assert_close(moco_loss(3 * queries, keys / 7, queue, 0.2), expected)


def test_contrastive_gradients():
    z, z_hat, queue = (t.requires_grad_() for t in vectors(3, n=4))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5), (z, z_hat))
    assert torch.autograd.gradcheck(lambda *v: moco_loss(*v, 0.5), (z, z_hat, queue))


def test_spd_by_hand():
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    same, opposite = z * 3, -z
    across = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert spd_loss(z, opposite, same).item() == -2
    assert spd_loss(z, same, opposite).item() == 2
    assert spd_loss(z, same, same).item() == 0
    assert spd_loss(z, across, same).item() == -1
    # the mean over the batch: one row apart, one not
    assert spd_loss(z, torch.stack([-z[0], z[1]]), same).item() == -1


def test_spd_gradient_flows_through_all_three():
    z, z_neg, z_pos = (t.requires_grad_() for t in vectors(3))
    assert torch.autograd.gradcheck(spd_loss, (z, z_neg, z_pos))
    spd_loss(z, z_neg, z_pos).backward()
    for t in (z, z_neg, z_pos):
        assert t.grad.abs().sum() > 0
    # a step against the gradient brings the positive nearer and the negative away
    with torch.no_grad():
        moved = [t - 0.1 * t.grad for t in (z, z_neg, z_pos)]
    assert cosine(moved[0], moved[2]).mean() > cosine(z, z_pos).mean()
    assert cosine(moved[0], moved[1]).mean() < cosine(z, z_neg).mean()


def test_spd_cross_entropy_equals_scikit_learn():
    negative, positive = vectors(2, d=2)
    probabilities = softmax(torch.cat([positive, negative]).numpy(), axis=1)
    expected = log_loss([0] * 6 + [1] * 6, probabilities)
    assert spd_cross_entropy(negative, positive).item() == pytest.approx(expected, rel=1e-12)
    knows_nothing = torch.zeros(3, 2)
    assert spd_cross_entropy(knows_nothing, knows_nothing).item() == pytest.approx(np.log(2))
