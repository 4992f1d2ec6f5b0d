"""JSON Schemas of files, for editors: the corpus is valid by them, its mutants are not."""

import json
import re
from pathlib import Path

import pytest
import yaml
from omegaconf._utils import get_yaml_loader

from flagscale_config.schema import KINDS, schema_text

jsonschema = pytest.importorskip("jsonschema")

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(path.relative_to(CORPUS) for path in CORPUS.rglob("*.yaml"))
REFUSED = ("fork.yaml", "removed.yaml", "placeholders.yaml")
# Below these keys any name may stand.
OPEN = re.compile(
    r"experiment\.(envs|node_args\.|runner\.(runtime_env|cli_args\.engine_args)|auto_tuner\.(args_mapping|platform))"
    r"|train\.extra_args|.*\.(rename_map|features|param_groups|scheduler_kwargs|scheduler_specific_kwargs|color_jitter"
    r"|embodiment_tag_mapping|learning_rate|loss_scale|from_pretrained|components|images|vla_data|vlm_data|extra_args"
    r"|compilation_config|limit_mm_per_prompt|append_kargs|sglang|llama_cpp)|.*kerv\.(env|arguments)"
    r"|defaults"
)
# In an experiment file these are only mappings to a schema: they have schemas of their own, or are options.
ELSEWHERE = r"(train|serve|inference|compress|rl|node_specific|device_type_specific)(\.|$)"


@pytest.fixture(scope="module")
def validators():
    found = {}
    for kind in KINDS:
        schema = json.loads(schema_text(kind))
        jsonschema.Draft202012Validator.check_schema(schema)
        found[kind] = jsonschema.Draft202012Validator(schema)
    return found


def kind_of(file: Path) -> str:
    return "experiment-file" if file.parent == Path() else f"{file.parent}-file"


def content(file: Path):
    return yaml.load((CORPUS / file).read_text(encoding="utf-8"), get_yaml_loader())


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_corpus_is_valid(file, validators):
    is_valid = validators[kind_of(file)].is_valid(content(file))
    # A placeholder for a path or a name is text to a schema.
    assert is_valid == (
        file.name not in REFUSED or str(file) in {"train_fork.yaml", "train/placeholders.yaml"}
    )


def mappings(tree, path=""):
    """Yield every mapping below a tree with its path."""
    if isinstance(tree, dict):
        yield path, tree
        for key, value in tree.items():
            yield from mappings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for item in tree:
            yield from mappings(item, path)


@pytest.mark.parametrize("file", [file for file in FILES if file.name not in REFUSED], ids=str)
def test_a_misspelt_key_is_not_valid(file, validators):
    tree = content(file)
    validator = validators[kind_of(file)]
    is_root = file.parent == Path()
    alive = []
    for path, mapping in mappings(tree, "" if is_root else str(file.parent)):
        is_elsewhere = is_root and re.match(ELSEWHERE, path)
        if is_elsewhere or OPEN.match(path) or "module" in mapping or "anything" in mapping or not mapping:
            continue
        key = f"{next(iter(mapping))}_misspelt"
        mapping[key] = 1
        if validator.is_valid(tree):
            alive.append(path)
        del mapping[key]
    assert not alive


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("train-file", "model: {num_layers: many}"),
        ("train-file", "system: {sequence_parallel: 3}"),
        ("train-file", "model: {position_embedding_type: ropes}"),
        ("serve-file", "- {serve_id: a, resources: {num_gpus: many}}"),
        ("serve-file", "- {serve_id: a, engine_args: {max_model_len: {a: 1}}}"),
        ("inference-file", "generate: {sampling: {top_p: high}}"),
        ("compress-file", "compress_args: {quantization: [{scheme: W4A17}]}"),
        ("rl-file", "trainer: {nnodes: many}"),
        ("experiment-file", "experiment: {runner: {nproc_per_node: many}}"),
        ("experiment-file", "experiment: {task: {type: trian}}"),
        ("experiment-file", "action: runn"),
    ],
)
def test_a_wrong_value_is_not_valid(kind, text, validators):
    assert not validators[kind].is_valid(yaml.safe_load(text))


@pytest.mark.parametrize("value", ["${experiment.seed}", "???", None])
def test_interpolations_and_values_still_to_be_given_are_valid(value, validators):
    assert validators["train-file"].is_valid({"model": {"num_layers": value}})
    assert validators["experiment-file"].is_valid({"experiment": {"runner": {"nnodes": value}}})
    assert validators["serve-file"].is_valid([{"serve_id": "a", "engine_args": {"max_model_len": value}}])
    assert validators["rl-file"].is_valid({"trainer": {"nnodes": value}})


def test_editors_get_help_choices_and_defaults():
    definitions = json.loads(schema_text("train-file"))["$defs"]
    option = definitions["megatron.position_embedding_type"]
    assert "rope" in json.dumps(option["anyOf"])
    assert option["default"] == "learned_absolute"
    assert option["description"]
    assert definitions["section"]["properties"]["position-embedding-type"] == {
        "$ref": "#/$defs/megatron.position_embedding_type"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_schema_is_the_same_every_time_and_names_its_version(kind):
    assert schema_text(kind) == schema_text(kind)
    assert json.loads(schema_text(kind))["$id"] == f"urn:flagscale:{kind}:1.1"
