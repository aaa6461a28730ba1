import copy
import sys

import pytest
import torch
import torch.nn.functional as F

from spd_fast.attention import BATCH, attention_maps, nearest_normal, pooled_features
from spd_fast.errors import InputError
from spd_fast.models import load_backbone


def pictures(count, seed=0, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def by_hooks(network, images, nearest):
    """GradCAM from scratch: image by image, layer4 caught by a hook, everything in float64."""
    network = copy.deepcopy(network).double().eval()
    network.fc = torch.nn.Identity()
    kept = {}
    network.layer4.register_forward_hook(lambda module, given, out: kept.update(layer4=out))
    maps = []
    for image, normal in zip(images.double(), nearest.double()):
        wanted = network(normal[None])[0].detach()
        own = network(image[None])[0]
        layer4 = kept["layer4"]
        cosine = own.dot(wanted) / own.norm() / wanted.norm()
        (gradient,) = torch.autograd.grad(-cosine, layer4)
        heat = (gradient.mean((2, 3), keepdim=True) * layer4).sum(1, keepdim=True).relu()
        heat = F.interpolate(heat.detach(), image.shape[1:], mode="bilinear")[0, 0]
        maps.append(heat / heat.max())
    return torch.stack(maps)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_maps_are_those_computed_by_hand(name):
    network = load_backbone(name, "random", seed=1)
    images, nearest = pictures(3, size=96), pictures(3, seed=1, size=96)
    maps = attention_maps(network, images, nearest)
    assert maps.shape == (3, 96, 96) and maps.dtype == torch.float32
    assert maps.min() == 0 and maps.amax((1, 2)).tolist() == [1, 1, 1]
    torch.testing.assert_close(maps.double(), by_hooks(network, images, nearest), rtol=0, atol=1e-3)


def test_batches_and_sizes_do_not_matter():
    network = load_backbone("resnet18", "random")
    images, nearest = pictures(BATCH + 1)[..., :40], pictures(BATCH + 1, seed=1)[..., :40]
    maps = attention_maps(network, images, nearest)
    assert maps.shape == (BATCH + 1, 64, 40)
    alone = attention_maps(network, images[-1:], nearest[-1:])
    torch.testing.assert_close(maps[-1:], alone, rtol=0, atol=1e-3)


def colour_network():
    """A ResNet whose features are the mean red, green and blue, where these are positive."""
    network = load_backbone("resnet18", "random")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.conv1.weight[range(3), range(3), 3, 3] = 1
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            if layer[0].downsample:
                layer[0].downsample[0].weight[range(3), range(3)] = 1
                layer[0].downsample[1].weight.fill_(1)
        network.bn1.weight.fill_(1)
    return network


def test_map_lies_on_what_the_nearest_normal_lacks():
    network = colour_network()
    normal = torch.ones(1, 3, 256, 256)
    defective = normal.clone()
    defective[:, 0, 64:156, 96:220] = 3  # too red there
    (heat,) = attention_maps(network, defective, normal)
    assert heat[80:144, 112:208].min() > 0.9
    far = torch.ones(256, 256, dtype=torch.bool)
    far[48:176, 80:240] = False  # a place of layer4 is 32 pixels wide, so edges are blurred
    assert heat[far].max() == 0
    redder = normal * torch.tensor([2.0, 1, 1]).view(3, 1, 1)  # what it lacks is green and blue
    (heat,) = attention_maps(network, defective, redder)
    assert heat[far].min() == 1 and heat[80:144, 112:208].max() == 0


def test_nearest_is_the_largest_cosine():
    network = colour_network()
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    normals = colours[:, :, None, None].expand(-1, -1, 64, 64)
    asked = torch.tensor([[0.1, 0, 5], [8, 9, 1], [3, 0.5, 0.5]])
    images = asked[:, :, None, None].expand(-1, -1, 32, 32)  # another size, and other lengths
    features = pooled_features(network, images)
    torch.testing.assert_close(features[:, :3], asked, rtol=1e-4, atol=0)
    assert features.shape == (3, 512) and features[:, 3:].abs().max() == 0
    for batches in (normals.split(4), normals.split(1), normals.flip(0).split(3)):
        for image, expected in zip(images, (2, 3, 0)):
            assert torch.equal(nearest_normal(network, image, batches), normals[expected])


def test_features_are_the_input_of_fc():
    network = load_backbone("resnet18", "random")
    images = pictures(BATCH + 3)
    with torch.no_grad():
        logits = copy.deepcopy(network).eval()(images)
    expected = F.linear(pooled_features(network, images), network.fc.weight, network.fc.bias)
    torch.testing.assert_close(expected, logits)


def test_without_a_difference_the_map_is_zero():
    network, images = load_backbone("resnet18", "random"), pictures(2)
    nearest = images.clone()
    nearest[1] = pictures(1, seed=5)[0]
    maps = attention_maps(network, images, nearest)
    assert maps[0].max() == 0 and maps[1].max() == 1
    black = attention_maps(colour_network(), torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64))
    assert black.max() == 0 and black.min() == 0  # no feature, so no direction: not NaN


def test_the_network_is_left_as_it_was():
    network = load_backbone("resnet18", "random").train()
    network.layer2.eval()
    network.layer1.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    needs = [parameter.requires_grad for parameter in network.parameters()]
    images = pictures(2)
    first = attention_maps(network, images, images.flip(0))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert modes == [module.training for module in network.modules()]
    assert needs == [parameter.requires_grad for parameter in network.parameters()]
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    assert images.grad is None and not images.requires_grad and not first.requires_grad
    torch.testing.assert_close(attention_maps(network.eval(), images, images.flip(0)), first)


def test_wrong_input_is_refused(monkeypatch):
    network, images = load_backbone("resnet18", "random"), pictures(2)
    with pytest.raises(InputError, match=r"nearest has shape \(1, 3, 64, 64\).*\(2, 3, 64, 64\)"):
        attention_maps(network, images, images[:1])
    for wrong in (images[0], images[:, :1], images[:0], images.to(torch.uint8)):
        with pytest.raises(InputError, match="images is .*expected"):
            attention_maps(network, wrong, wrong)
        with pytest.raises(InputError, match="normals is .*expected"):
            nearest_normal(network, images[0], [wrong])
    with pytest.raises(InputError, match="no normal image"):
        nearest_normal(network, images[0], [])
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(InputError, match=r"spd-fast\[paper\]"):
        attention_maps(network, images, images)
