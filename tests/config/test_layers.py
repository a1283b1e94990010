"""Where a value comes from: preset, data set, file, command line; what is assumed; what `--print-config` says."""

import json
import re
from pathlib import Path

import pytest
import yaml

from fastrdm import cli
from fastrdm.config import run_config, tree
from fastrdm.config.layers import Layer, last_to_set, user_sets
from fastrdm.config.run_config import RECIPES
from fastrdm.config.source_defaults import assume
from fastrdm.loaders.spec import STATISTICS
from fastrdm.methods.presets import PRESETS
from fastrdm.models.foreign_weights import check_export


def test_the_quick_start_is_what_no_arguments_give_and_nothing_else() -> None:
    assert run_config.load([]) == run_config.load(["quickstart.yaml"])
    assert run_config.load([]).encoder.name == "resnet_small"
    for words in (["preset=simsiam"], ["train.length=5ep"], ["loader.source=digits"]):
        assert run_config.load(words).encoder.name == "resnet18"


def test_photographs_without_a_file_are_a_plain_resnet18_that_torchvision_takes() -> None:
    """The acceptance of issue 18."""
    loaded = run_config.compose(["loader.source=folder", "loader.root=DATA", "encoder.name=resnet18"])
    c = loaded.config
    check_export(c.encoder, "torchvision")
    assert (c.encoder.width, c.encoder.stem) == (None, "imagenet")
    assert {(v.size, v.scale, v.interpolation, v.blur, v.flip) for v in c.loader.views} == {
        (224, (0.2, 1.0), "bilinear", 0.5, 0.5)
    }
    assert loaded.assumed == [
        "assumed, as nobody set it: preset=simsiam, train.length=100ep, loader.batch_size=256",
        "assumed, as folder holds photographs: views of 224 px as simsiam draws them of ImageNet",
    ]


PUBLISHED = {"simsiam": "imagenet/simsiam.yaml", "byol": "imagenet/byol.yaml", "swav": "imagenet/swav_2x224.yaml"}


@pytest.mark.parametrize(("preset", "recipe"), PUBLISHED.items())
def test_views_of_photographs_are_the_recipes(preset: str, recipe: str) -> None:
    assumed = run_config.load([f"preset={preset}", "loader.source=folder"])
    assert assumed.loader.views == run_config.load([recipe]).loader.views


def test_views_of_photographs_for_dino_are_the_recipes_two_global_ones() -> None:
    assumed = run_config.load(["preset=dino", "loader.source=folder"])
    assert assumed.loader.views == run_config.load(["imagenet/dino.yaml"]).loader.views[:2]


@pytest.mark.parametrize("preset", PRESETS)
def test_small_sets_keep_the_presets_views(preset: str) -> None:
    found, plain = (
        run_config.load([f"preset={preset}", "loader.source=cifar100"]),
        run_config.resolve({"preset": preset}),
    )
    assert found.encoder.stem == "cifar"
    for view, own in zip(found.loader.views, plain.loader.views, strict=True):
        assert (view.mean, view.std) == STATISTICS["cifar100"]
        assert (view.size, view.scale, view.solarize, view.hue) == (32, own.scale, own.solarize, own.hue)


def test_networks_of_timm_get_nothing_that_only_resnets_have() -> None:
    for source in ("cifar10", "folder", "my.module:Source"):
        c = run_config.load([f"loader.source={source}", "encoder.name=timm/vit_tiny_patch16_224"])
        assert (c.encoder.stem, c.encoder.width, c.encoder.zero_init_residual) == ("imagenet", None, False)


def test_a_file_lies_over_what_is_assumed_and_the_command_line_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("loader: {source: folder, views: {0: {size: 96}}}\noptim: {lr: 0.1}\n")
    loaded = run_config.compose([str(tmp_path / "own.yaml"), "loader.views.1.size=64"])
    assert [view.size for view in loaded.config.loader.views] == [96, 64]
    keys = [f"loader.views.{key}" for key in ("0.size", "1.size", "0.blur", "0.hue")] + ["optim.lr", "optim.name"]
    deciding = {key: last_to_set(loaded.layers, key) for key in keys}
    origins = {key: layer and layer.origin for key, layer in deciding.items()}
    assert origins == {
        "loader.views.0.size": str(tmp_path / "own.yaml"),
        "loader.views.1.size": "command line",
        "loader.views.0.blur": "suits the data",
        "loader.views.0.hue": None,
        "optim.lr": str(tmp_path / "own.yaml"),
        "optim.name": "preset simsiam",
    }


def test_a_list_written_anew_forgets_the_layers_below() -> None:
    below, above = {"a": [{"x": 1, "y": 1}]}, {"a": [{"x": 2}]}
    layers = [Layer("below", below), Layer("above", above)]
    assert last_to_set(layers, "a.0.x") == layers[1]
    assert last_to_set(layers, "a.0.y") is None, "the default of its field"
    assert last_to_set(layers, "b") is None
    assert last_to_set([*layers, Layer("star", {"a": {"*": {"y": 3}}})], "a.0.y") == Layer(
        "star", {"a": {"*": {"y": 3}}}
    )


def test_only_the_users_layers_count_as_chosen(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("base: recipe.yaml\noptim: {lr: 0.1}\n")
    (tmp_path / "recipe.yaml").write_text("optim: {warmup: 3ep}\n")
    given = user_sets(run_config.compose([str(tmp_path / "own.yaml"), "train.seed=1"]).layers)
    assert all(map(given, ("optim.lr", "optim.warmup", "train.seed")))
    given = user_sets(run_config.compose(["cifar10/cpu.yaml"]).layers)
    assert not any(map(given, ("optim.warmup", "optim.lr", "train.seed", "loader.subset")))


@pytest.mark.parametrize(
    "words", [[], ["preset=dino", "loader.source=folder"], ["cifar10/cpu_swav.yaml", "optim.lr=1e-5"]]
)
def test_print_config_says_where_each_value_comes_from_and_loads_again(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.train([*words, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == run_config.to_dict(run_config.load(words))
    (tmp_path / "printed.yaml").write_text(printed)
    assert run_config.load([str(tmp_path / "printed.yaml")]) == run_config.load(words)
    values = [line for line in printed.splitlines() if not line.rstrip().endswith((":", "-"))]
    origins = {line.partition("  # ")[2] for line in values}
    allowed = {
        "default",
        "suits the data",
        "command line",
        "quickstart.yaml",
        "cifar10/cpu.yaml",
        "cifar10/cpu_swav.yaml",
    }
    assert all(origin in allowed or origin.startswith("preset ") for origin in origins) and len(origins) >= 3


def test_published_gives_the_recipes_precision_and_the_command_line_wins() -> None:
    assert run_config.load(["cifar10/resnet18.yaml"]).train.precision == "auto"
    assert run_config.load(["cifar10/resnet18.yaml"], published=True).train.precision == "fp16"
    assert run_config.load(["cifar100/resnet18.yaml"], published=True).train.precision == "fp16", "of its base"
    assert run_config.load(["cifar10/resnet18.yaml", "train.precision=fp32"], published=True).train.precision == "fp32"


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_has_a_recipe_for_a_cpu_and_others_are_refused_with_its_name(preset: str) -> None:
    fitting = []
    for recipe in sorted((RECIPES / "cifar10").glob("cpu*.yaml")):
        try:
            run_config.load([str(recipe), f"preset={preset}"])
            fitting.append(recipe.name)
        except ValueError as refused:
            assert f"preset must be one that cifar10/{recipe.name} is made for" in str(refused)
            assert ".yaml is" in str(refused)
    assert len(fitting) == 1


def test_cpu_yaml_leads_to_dinos_own() -> None:
    with pytest.raises(ValueError, match=r"got 'dino': cifar10/cpu_dino.yaml is$"):
        run_config.load(["cifar10/cpu.yaml", "preset=dino"])
    assert run_config.load(["cifar10/cpu_dino.yaml"]).preset == "dino"


def test_a_users_file_may_build_on_a_recipe_with_any_preset(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"base: {RECIPES / 'cifar10' / 'cpu.yaml'}\npreset: dino\n")
    assert run_config.load([str(tmp_path / "own.yaml")]).preset == "dino"


# shared/cases/18: YAML's merge key
def test_yamls_merge_key(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("loader:\n  views:\n    0: &v {size: 24, blur: 0.5}\n    1: {<<: *v, solarize: 0.2, blur: 0.1}\n")
    found = run_config.load([str(file)]).loader.views
    assert [(v.size, v.blur, v.solarize) for v in found] == [(24, 0.5, 0.0), (24, 0.1, 0.2)]


LAUGHS = "\n".join([f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(10)])
BOUNDED = {
    f"a0: &a0 [l, l, l, l, l, l, l, l, l]\n{LAUGHS}\nrun: *a10\n": "of at most 100,000 values",
    "a: &a [*a]\n": "does not hold itself",
    "a: " + "[" * 200 + "]" * 200 + "\n": "nested at most 100 deep",
    "a: " + "[" * 20000 + "\n": "nested at most 100 deep",
    "train: {seed: 2020-13-45}\n": "month must be in 1..12",
}


# shared/cases/05: billion laughs
@pytest.mark.parametrize("text", BOUNDED, ids=[value.replace(" ", "-") for value in BOUNDED.values()])
def test_what_would_fill_the_memory_is_refused_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert cli.train([str(tmp_path / "c.yaml"), "--print-config"]) == cli.EXIT_REFUSED
    told = capsys.readouterr().err
    assert BOUNDED[text] in told and told.count("\n") == 1 and len(told) < 300


def test_a_long_wrong_value_is_told_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train([f"optim.lr=[{', '.join(['0.1'] * 5000)}]"]) == cli.EXIT_REFUSED
    assert len(capsys.readouterr().err) < 400


def test_keys_about_the_file_are_checked(tmp_path: Path) -> None:
    for text, told in {
        "presets: simsiam": "presets must be a list",
        "published: fp16": "published must hold keys",
    }.items():
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=told):
            tree.read_files(tmp_path / "c.yaml")


MEANT = {
    "--epochs": "train.length=",
    "--lr": "optim.lr=",
    "--batch-size=8": "loader.batch_size=",
    "--batch": "loader.batch_size=",
    "--probe-lr": "evaluate.probe_lr=",
    "--gpus": "--processes N",
}


@pytest.mark.parametrize("option", MEANT)
def test_options_of_other_trainers_name_the_setting(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train([option, "3"]) == cli.EXIT_REFUSED
    told = capsys.readouterr().err
    assert told.startswith(f"fastrdm: unknown option {option}: write {MEANT[option]}") and told.count("\n") == 1


def test_a_key_that_others_call_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train(["train.epochs=3"]) == cli.EXIT_REFUSED
    assert "unknown configuration key 'train.epochs': did you mean train.length=100ep?" in capsys.readouterr().err


def test_the_schema_describes_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("schema", []) == 0
    schema = json.loads(capsys.readouterr().out)
    lr = schema["$defs"]["OptimConfig"]["properties"]["lr"]
    assert lr["type"] == "number" and lr["description"].startswith("Peak learning rate")
    assert schema["$defs"]["OptimConfig"]["additionalProperties"] is False
    assert {"base", "presets", "published", "train", "loader"} <= set(schema["properties"])
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    for file in sorted(RECIPES.rglob("*.yaml")):
        read = yaml.safe_load(re.sub(r"\b(\d+)e-(\d+)", r"\1.0e-\2", file.read_text()))  # as YAML 1.2 has numbers
        assert [error.message for error in validator.iter_errors(read)] == [], file
    assert list(validator.iter_errors({"optim": {"lrr": 1}}))


def test_assumptions_name_every_family() -> None:
    for preset in PRESETS:
        assert assume("folder", preset, "resnet18").tree["loader"]["views"]["*"]["size"] == 224
