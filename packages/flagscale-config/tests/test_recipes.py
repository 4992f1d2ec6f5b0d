"""Recipes of installed packages are found by name, and nothing of them is imported."""

import sys

import pytest

from flagscale_config import ConfigError, load, recipes

FILES = {
    "site/offering/__init__.py": "raise RuntimeError('a recipe package must not be imported')\n",
    "site/offering/recipes/__init__.py": "raise RuntimeError('a recipe package must not be imported')\n",
    "site/offering/recipes/acme/conf/0_6b.yaml": (
        "defaults: [_self_, {serve: 0_6b}]\nexperiment: {exp_name: q, task: {type: serve}}\n"
    ),
    "site/offering/recipes/acme/conf/serve/0_6b.yaml": "- {serve_id: m, engine_args: {model: x}}\n",
    "site/offering/recipes/acme3/conf/70b.yaml": "a: 1\n",
    "site/offering/recipes/both/conf/7b.yaml": (
        "defaults: [_self_, {serve: 7b}]\nexperiment: {exp_name: s, task: {type: serve}}\n"
    ),
    "site/offering/recipes/both/conf/serve/7b.yaml": "- {serve_id: m, engine_args: {model: x}}\n",
    "site/school/recipes/both/conf/7b.yaml": (
        "defaults: [_self_, {train: 7b}]\nexperiment: {exp_name: t, task: {type: train}}\n"
    ),
    "site/school/recipes/both/conf/train/7b.yaml": "model: {num_layers: 2}\n",
    "site/school-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: school\nVersion: 1.0\n",
    "site/school-1.0.dist-info/entry_points.txt": "[flagscale.recipes]\nschool = school.recipes\n",
    "site/offering-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n",
    "site/offering-1.0.dist-info/entry_points.txt": "[flagscale.recipes]\noffering = offering.recipes\n",
}


@pytest.fixture
def offered(project, monkeypatch, tmp_path):
    project(FILES)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site/offering/recipes"


def test_recipes_are_found_without_importing(offered):
    found = recipes()
    assert found["acme/0_6b"] == offered / "acme/conf/0_6b.yaml"
    assert "acme3/70b" in found
    assert not any(name.startswith("acme/serve") for name in found)
    assert "offering" not in sys.modules


def test_a_recipe_loads_by_name_with_overrides(offered):
    experiment = load("acme/0_6b", ["experiment.exp_name=mine"])
    assert experiment.name == "mine"
    assert experiment.serve[0].engine_args == {"model": "x"}


def test_a_mistyped_recipe_names_the_nearest(offered):
    with pytest.raises(
        ConfigError, match=r"acme/06b: no such file and no such recipe; did you mean acme/0_6b\?"
    ):
        load("acme/06b")


def test_a_file_wins_over_a_recipe(offered, project):
    project({"acme/0_6b.yaml": "experiment: {exp_name: f, task: {type: serve}}\nserve: [{serve_id: a}]\n"})
    assert load("acme/0_6b").name == "f"


def test_a_name_offered_for_two_tasks_is_chosen_by_the_task(offered, tmp_path):
    school = tmp_path / "site/school/recipes/both/conf/7b.yaml"
    assert recipes("train")["both/7b"] == school
    assert recipes("serve")["both/7b"] == offered / "both/conf/7b.yaml"
    assert load("both/7b", task="serve").name == "s"
    assert "both/7b" not in recipes()
    assert recipes()["train:both/7b"] == school


def test_a_name_offered_for_two_tasks_alone_asks_which(offered):
    with pytest.raises(ConfigError, match=r"several tasks; say serve:both/7b or train:both/7b"):
        load("both/7b")
    assert load("serve:both/7b").name == "s"
