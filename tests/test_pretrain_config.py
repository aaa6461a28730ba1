from dataclasses import fields

import pytest
import yaml

from spd_fast import InputError, recipes
from spd_fast.cli import RECIPES as CLI_RECIPES
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
    """What the papers and their authors' code say, for a backbone as a whole."""
    for name, batch_size, initial_lr, epochs in (
        ("simsiam", 512, 0.1, 100),
        ("moco", 256, 0.03, 200),
        ("simclr", 4096, 4.8, 100),
        ("supervised", 256, 0.1, 90),
    ):
        recipe = read_recipe(name)
        assert (recipe["batch_size"], recipe["epochs"]) == (batch_size, epochs)
        assert recipe["lr"] * batch_size / 256 == pytest.approx(initial_lr)
    moco = read_recipe("moco")
    assert (moco["queue_size"], moco["key_momentum"], moco["temperature"]) == (65536, 0.999, 0.2)
    assert CLI_RECIPES == RECIPES


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
    with pytest.raises(InputError, match="key_momentum must be at most 1, got 2"):
        resolved(PretrainConfig(["images"], "out", recipe="moco", key_momentum=2))
    with pytest.raises(InputError, match="batch_size must be at least 4 for batch norm, got 2"):
        resolved(PretrainConfig(["images"], "out", recipe="moco", batch_size=2))


def test_files_of_settings(tmp_path):
    config = resolved(PretrainConfig(["a", "b"], "out", recipe="simclr", spd=False, resume="auto"))
    write_config(tmp_path / "config.yaml", config)
    assert resolved(PretrainConfig(**read_config(tmp_path / "config.yaml"))) == resolved(
        PretrainConfig(["a", "b"], "out", recipe="simclr", spd=False)
    )
    assert "resume" not in settings(config) and "queue_size" not in settings(config)
    for text, message in (
        ("data: [a]\nlearning_rate: 3", "'learning_rate' is no setting"),
        ("just words", "'just words' is no setting"),
        ("a: [", "is not YAML"),
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            read_config(tmp_path / "wrong.yaml")
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
    assert len(given) == 1
