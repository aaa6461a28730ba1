import pytest
import torch
from torchvision.models import resnet18, resnet34, resnet50
from torchvision.models.feature_extraction import create_feature_extractor

from spd_fast.errors import InputError
from spd_fast.models import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_VERSION,
    WEIGHTS_FILE,
    FeatureLayers,
    load_backbone,
    new_backbone,
    pick_device,
    read_checkpoint,
)


def images(n: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize("build", [resnet18, resnet50])
def test_feature_layers_equal_torchvisions_extractor(build):
    network = build().eval()
    names = ["layer1", "layer2", "layer3"]
    with torch.no_grad():
        expected = create_feature_extractor(network, names)(images(2, 64))
        layers = FeatureLayers(network)(images(2, 64))
    for name, layer in zip(names, layers, strict=True):
        assert torch.equal(layer, expected[name])
    assert not any(key.startswith("layer4") for key in FeatureLayers(network).state_dict())


def test_unknown_backbone_lists_the_known():
    for name in ("resnet19", "vgg16", "quantized_resnet18"):
        with pytest.raises(InputError, match="resnet18.*wide_resnet50_2.*got '" + name):
            new_backbone(name)


def test_random_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    first = load_backbone("resnet18", "random", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = (load_backbone("resnet18", "random", seed=s) for s in (3, 4))
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize("change", ["whole", "without fc", "fc of 10 classes", "before 2018"])
def test_torchvision_state_dicts(change, tmp_path):
    source = resnet18(num_classes=10 if change == "fc of 10 classes" else 1000).eval()
    source.bn1.running_mean += 0.25
    state = source.state_dict()
    if change == "without fc":
        state = without_fc(state)
    if change == "before 2018":  # batch norm did not count its batches
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pth")
    loaded = load_backbone("resnet18", tmp_path / "weights.pth").eval()
    with torch.no_grad():
        for ours, theirs in zip(
            FeatureLayers(loaded)(images()), FeatureLayers(source)(images()), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert torch.equal(loaded.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: tensor for key, tensor in state.items()}


HEADS = {"fc.0.weight": torch.ones(512, 512), "fc.2.bias": torch.ones(8)}
WRAPPED = {  # what training scripts make of a torchvision state dict
    "state_dict": lambda state: {"state_dict": state},
    "DataParallel": lambda state: {"epoch": 90, "arch": "x", "state_dict": under("module.", state)},
    "bare DataParallel": lambda state: under("module.", state),
    "SimSiam": lambda state: {
        "epoch": 100,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "state_dict": under("module.encoder.", without_fc(state) | HEADS)
        | {"module.predictor.0.weight": torch.ones(4, 8)},
    },
    "MoCo": lambda state: {
        "state_dict": under("module.encoder_q.", without_fc(state) | HEADS)
        | under("module.encoder_k.", {k: torch.zeros_like(v) for k, v in state.items()})
        | {"module.queue": torch.ones(8, 16), "module.queue_ptr": torch.zeros(1)},
    },
}


def without_fc(state: dict) -> dict:
    return {k: v for k, v in state.items() if not k.startswith("fc.")}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_state_dicts_as_training_scripts_save_them(wrapper, tmp_path):
    expected = load_backbone("resnet18", "random", seed=1).state_dict()
    torch.save(WRAPPED[wrapper](expected), tmp_path / "weights.pth.tar")
    loaded = load_backbone("resnet18", tmp_path / "weights.pth.tar").state_dict()
    for key in without_fc(expected):
        assert torch.equal(loaded[key], expected[key]), key


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "weights.pth"

    def message(value) -> str:
        torch.save(value, path)
        return refusal(path)

    def refusal(file) -> str:
        with pytest.raises(InputError) as caught:
            load_backbone("resnet18", file)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    state = resnet18().state_dict()
    # every tensor of resnet18 is in resnet34's file, and of the right shape
    assert message(resnet34().state_dict()) == (
        f"{path} holds a resnet34 backbone, but a resnet18 was asked for"
    )
    without = {k: v for k, v in state.items() if k != "layer2.0.conv1.weight"}
    assert "1 tensors missing, such as layer2.0.conv1.weight" in message(without)
    reshaped = state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
    assert "1 tensors of other shape, such as conv1.weight" in message(reshaped)
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "config": {"backbone": "resnet50"},
        "backbone": {},
    }
    assert message(checkpoint) == f"{path} holds a resnet50 backbone, but a resnet18 was asked for"
    assert "version 99" in message(checkpoint | {"version": 99})
    for value in ([1, 2, 3], {"format": "else"}, {"state_dict": [1]}, {1: torch.ones(1)}):
        assert message(value) == f"{path} is not {WEIGHTS_FILE}"
    for value in ({}, {"state_dict": {}}):
        assert "not hold the weights of a resnet18: 100 tensors missing, such as" in message(value)
    assert "1 tensors missing, such as layer2.0" in message(
        {"state_dict": under("module.", without)}
    )

    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    damaged = f"{path} is not {WEIGHTS_FILE}, or is damaged"
    assert refusal(path) == f"{damaged} (RuntimeError)"
    path.write_text("not weights")
    assert refusal(path) == f"{damaged} (UnpicklingError)"
    assert refusal(tmp_path) == f"cannot read {tmp_path}: Is a directory"
    missing = tmp_path / "missing.pth"
    assert refusal(missing) == f"there is no file {missing}, expected {WEIGHTS_FILE}"


def test_read_checkpoint_refuses_other_files(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match="weights.pth is not a checkpoint"):
        read_checkpoint(tmp_path / "weights.pth")
    with pytest.raises(InputError, match="there is no file .*missing.pt"):
        read_checkpoint(tmp_path / "missing.pt")


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError) as caught:
        load_backbone("resnet18", "imagenet")
    message = str(caught.value)
    assert "resnet18" in message and "https://" in message and "state dict" in message
    assert "\n" not in message


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="tpu9"):
        pick_device("tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="GPU"):
            pick_device("cuda")
