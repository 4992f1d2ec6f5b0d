"""Recipes that are installed: composed as by Hydra, valid for editors, copied whole; mutants caught."""

import json
import re
import runpy
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from flagscale_config import check, load, models, new, recipes
from flagscale_config.compose import compose

ROOT = Path(__file__).resolve().parent.parent
RECIPES = recipes()
FOLDERS = sorted({path.parent for path in RECIPES.values()})
FILES = sorted(path for folder in FOLDERS for path in folder.rglob("*.yaml"))
# The corpus of flagscale-config makes its mutants with the same functions.
MUTANTS = SimpleNamespace(**runpy.run_path(str(ROOT / "packages/flagscale-config/tests/test_corpus.py")))


def label(path):
    """Return `train/qwen3` for a folder of recipes, `train/qwen3/train/0_6b` for a file in it."""
    task, _, rest = str(path).partition("/recipes/")
    return f"{task.rpartition('_')[2]}/{rest.replace('conf', '').replace('//', '/').removesuffix('.yaml')}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composes_as_by_hydra(name):
    path = RECIPES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with initialize_config_dir(version_base=None, config_dir=str(path.parent)):
            theirs = hydra_compose(path.stem)
    ours = compose(path).config
    assert OmegaConf.to_container(ours, resolve=False) == OmegaConf.to_container(theirs, resolve=False)


@pytest.mark.parametrize("folder", FOLDERS, ids=label)
def test_every_mutant_of_a_recipe_is_caught_at_its_line(folder, tmp_path):
    run = MUTANTS.bench_for(folder, tmp_path / "conf")
    batches = list(MUTANTS.mutants(folder))
    assert [alive for batch in batches for alive in MUTANTS.survivors(run, batch)] == []
    kinds = Counter(batch[2] for batch in batches for _ in batch[3])
    assert kinds["unknown key"] >= 5 * len(list(folder.glob("*.yaml")))
    assert kinds["mapping"] >= 5


@pytest.fixture(scope="module")
def validators():
    import jsonschema

    found = {}
    for kind in ("experiment", "train", "serve"):
        schema = json.loads((ROOT / f"schemas/{kind}-file.json").read_text(encoding="utf-8"))
        found[kind] = jsonschema.Draft202012Validator(schema)
    return found


@pytest.mark.parametrize("file", FILES, ids=label)
def test_a_file_of_a_recipe_is_valid_by_the_committed_schema(file, validators):
    tree = yaml.load(file.read_text(encoding="utf-8"), get_yaml_loader())
    kind = file.parent.name if file.parent.name in validators else "experiment"
    assert [error.message for error in validators[kind].iter_errors(tree)] == []
    misspelt = tree if isinstance(tree, dict) else tree[0]
    misspelt[f"{next(iter(misspelt))}_misspelt"] = {}
    assert not validators[kind].is_valid(tree)


def given(path):
    """Return overrides for what a recipe asks of its user; it asks for nothing but paths."""
    asked = [problem for problem in check(path) if problem.severity == "error"]
    assert {problem.code for problem in asked} <= {"config/required"}, asked
    return [f"{problem.key}=/some/where" for problem in asked]


@pytest.mark.parametrize("name", RECIPES)
def test_an_experiment_begun_from_a_recipe_is_sound_and_the_same(name, tmp_path, monkeypatch):
    copies = new(name, tmp_path / "mine")
    assert all(copy.is_relative_to(tmp_path / "mine/conf") for copy in copies)
    monkeypatch.setattr("flagscale_config.loader.recipes", dict)  # the copies are all there is
    errors = [problem for problem in check(copies[0], given(copies[0])) if problem.severity == "error"]
    assert errors == []
    mine, theirs = (load(path, given(path)) for path in (copies[0], RECIPES[name]))
    assert mine.model_dump(exclude={"source", "notes"}) == theirs.model_dump(exclude={"source", "notes"})


# What README's training table does not list: served only, or of families beside those of the tables.
NOT_TRAINED = {"grok2-270b", "kimi-k2-1t", "qwen3-omni-30b-a3b"}
NO_ROW = re.compile(r"flagscale-.*|ernie.*|qwen3-next.*|qwen3-vl.*")


def test_every_published_size_of_the_tables_has_a_recipe_to_train_it():
    published = {name for name in models.names() if not NO_ROW.fullmatch(name)}
    trained = set()
    for path in RECIPES.values():
        experiment = load(path, given(path)) if "/flagscale_train/" in str(path) else None
        if experiment is not None and (found := models.match(experiment)).is_equal:
            trained |= set(found.models)
    assert published - trained == NOT_TRAINED
