"""How an operation is called: at once, or through torch's dispatcher where that is needed."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spd_fast import greedy_kcenter
from spd_fast.ops.mahalanobis import gaussian_factor, gaussian_update, mahalanobis_map
from spd_fast.reference import packed_size


@pytest.fixture
def arguments():
    features = [torch.randn(2, 6, 4, 4), torch.randn(2, 5, 2, 2)]
    return features, torch.arange(9), torch.randn(16, 9), torch.randn(16, packed_size(9))


def test_a_call_does_not_import_the_compiler():
    code = (
        "import sys, torch\nfrom spd_fast import greedy_kcenter\n"
        "greedy_kcenter(torch.randn(20, 3), 5)\n"
        "print('torch._dynamo' in sys.modules)\n"
        "torch.ops.spd_fast.greedy_kcenter(torch.randn(20, 3), 5)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]  # True: once it is not, `call` is not needed


def test_compiled_calls_are_one_operation(arguments):
    compiled = torch.compile(mahalanobis_map, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), mahalanobis_map(*arguments))
    points = torch.randn(30, 3)
    compiled = torch.compile(greedy_kcenter, backend="eager", fullgraph=True)
    assert torch.equal(compiled(points, 7, 2), greedy_kcenter(points, 7, 2))


def test_fake_tensors_have_the_shape_of_the_result(arguments):
    with FakeTensorMode() as mode:
        features, *rest = arguments
        fake = [[mode.from_tensor(f) for f in features], *map(mode.from_tensor, rest)]
        assert mahalanobis_map(*fake).shape == (2, 4, 4)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_gradient_is_refused_when_it_is_asked_for(arguments, backend):
    features, *rest = arguments
    features[1].requires_grad_()
    found = mahalanobis_map(features, *rest, backend=backend)
    plain = mahalanobis_map([f.detach() for f in features], *rest, backend=backend)
    assert torch.equal(found, plain)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        found.sum().backward()


def test_tensors_written_to_count_their_versions(arguments):
    """So that autograd notices if it had saved them for later."""
    features, channels, mean, scatter = arguments
    scatter.zero_()
    weight = torch.ones((), requires_grad=True)
    products = (weight * mean).sum(), (weight * scatter).sum()
    gaussian_update(features, channels, 0, mean, scatter)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        products[0].backward()
    gaussian_factor(scatter, len(channels), 2, 1.0)
    with pytest.raises(RuntimeError, match="is at version 3; expected version 1"):
        products[1].backward()
