from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from spd_fast import InputError, recipes
from spd_fast.cli import main
from spd_fast.pretrain_config import (
    RECIPES,
    PretrainConfig,
    read_config,
    read_recipe,
    resolved,
    settings,
    write_config,
)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_settings_only(name):
    recipe = read_recipe(name)
    assert recipe.keys() <= {field.name for field in fields(PretrainConfig)}
    assert callable(getattr(recipes, name))
    config = resolved(PretrainConfig(["images"], "out", recipe=name))
    assert all(getattr(config, key) == value for key, value in recipe.items())
    assert config.weight_decay == 1e-4  # a number, which 1e-4 is not in YAML


def test_recipes_are_the_official_ones():
    """Papers and their authors' code; rates are those of a whole batch of the recipe's size."""
    columns = (
        "batch_size",
        "epochs",
        "optimizer",
        "momentum",
        "schedule",
        "warmup_epochs",
        "sync_bn",
        "spd_loss",
    )
    rows = {
        "simsiam": (512, 100, "sgd", 0.9, "cosine", 0, True, "cosine"),
        "moco": (256, 200, "sgd", 0.9, "cosine", 0, False, "cosine"),
        "simclr": (4096, 100, "lars", 0.9, "cosine", 10, True, "cosine"),
        "supervised": (256, 90, "sgd", 0.9, "steps", 0, False, "xent"),
    }
    rates = {"simsiam": 0.1, "moco": 0.03, "simclr": 4.8, "supervised": 0.1}
    heads = {
        "simsiam": {"dim": 2048, "predictor_dim": 512},
        "moco": {
            **{"dim": 128, "temperature": 0.2, "queue_size": 65536, "key_momentum": 0.999},
            "bn_group": 32,
        },
        "simclr": {"dim": 128, "temperature": 0.1},
        "supervised": {},
    }
    for name, row in rows.items():
        recipe = read_recipe(name)
        assert tuple(recipe[column] for column in columns) == row
        assert recipe["lr"] * recipe["batch_size"] / 256 == pytest.approx(rates[name])
        assert recipe == {c: recipe[c] for c in columns} | heads[name] | {
            "lr": recipe["lr"],
            "weight_decay": 1e-4,
        }


def test_given_values_stand_before_the_recipes():
    config = resolved(PretrainConfig(["images"], "out", recipe="moco", queue_size=512, epochs=1))
    assert (config.queue_size, config.epochs, config.temperature) == (512, 1, 0.2)
    for name, recipe in (
        ("predictor_dim", "moco"),
        ("queue_size", "simclr"),
        ("dim", "supervised"),
    ):
        with pytest.raises(InputError, match=f"the recipe {recipe} has no {name}"):
            resolved(PretrainConfig(["images"], "out", recipe=recipe, **{name: 8}))
    with pytest.raises(InputError, match="queue_size must be at least one batch, 256, got 8"):
        resolved(PretrainConfig(["images"], "out", recipe="moco", queue_size=8))
    with pytest.raises(InputError, match="sync_bn would undo what MoCo's groups are for"):
        resolved(PretrainConfig(["images"], "out", recipe="moco", sync_bn=True))
    with pytest.raises(InputError, match="key_momentum must be at most 1, got 2"):
        resolved(PretrainConfig(["images"], "out", recipe="moco", key_momentum=2))


def test_files_of_settings(tmp_path):
    config = resolved(PretrainConfig(["a", "b"], "out", recipe="simclr", spd=False, resume="auto"))
    write_config(tmp_path / "config.yaml", config)
    paths = [str(Path(name).resolve()) for name in ("a", "b")]
    assert resolved(PretrainConfig(**read_config(tmp_path / "config.yaml"))) == resolved(
        PretrainConfig(paths, "out", recipe="simclr", spd=False)
    )
    assert "resume" not in settings(config) and "queue_size" not in settings(config)
    for text, message in (
        ("data: [a]\nlearning_rate: 3", "'learning_rate' is no setting"),
        ("just words", "it holds 'just words'"),
        ("", "it holds None"),
        ("a: [", "is not YAML"),
        ("epochs: 1.5", "epochs cannot be 1.5"),
        ("spd: maybe", "spd cannot be 'maybe'"),
        ("eta: null", "eta cannot be None"),
        ("lr: fast", "lr cannot be 'fast'"),
        ("batch_size: true", "batch_size cannot be True"),
        ("data: 3", "data cannot be 3"),
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            read_config(tmp_path / "wrong.yaml")
    (tmp_path / "right.yaml").write_text("lr: 1e-4\neta: 1\nepochs: null\ndata: a\n")
    assert read_config(tmp_path / "right.yaml") == {
        **{"lr": 1e-4, "eta": 1.0, "epochs": None, "data": "a"}
    }
    with pytest.raises(InputError, match="nowhere.yaml cannot be read"):
        read_config(tmp_path / "nowhere.yaml")


def test_the_command_line_stands_before_the_file(tmp_path, monkeypatch):
    import spd_fast.pretrain as module

    given = []
    monkeypatch.setattr(module, "pretrain", lambda config: given.append(config) or 0)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"data": ["a"], "out": "x", "recipe": "moco", "eta": 0.3}))
    assert main(["pretrain", "--config", str(file), "--out", "y", "--no-spd"]) == 0
    assert given[0] == PretrainConfig(["a"], "y", recipe="moco", eta=0.3, spd=False)
    assert main(["pretrain", "--out", "y"]) == 2  # no data
    assert main(["pretrain", "--config", str(file), "--out", "y", "--recipe", "simclr"]) == 2
    assert len(given) == 1
