"""A corpus of FlagScale-style files with every key that FlagScale's files have, and mutants of its leaves.

The mutants of recipes are made by the same functions (`tests/test_recipes.py` of the repository).

`corpus/keys.txt` lists the keys, `corpus/expected.json` what `check` says about each file. After a wanted
change of a message, write the latter anew: `python test_corpus.py` in this folder.
"""

# ruff: noqa: E501 - patterns are easier to read in one line

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from omegaconf._utils import get_yaml_loader

from flagscale_config import check
from flagscale_config.verl import verl_keys

CORPUS = Path(__file__).parent / "corpus"
ROOTS = sorted(path.name for path in CORPUS.glob("*.yaml"))
GROUPS = ("train", "serve", "inference", "compress", "rl")
REFUSED = ("fork", "removed", "placeholders")

# Where any key may stand, and why. Keys are dotted paths; a list item is its number.
OPEN_KEYS = {
    r"experiment\.envs\..*": "environment variables have any name",
    r"experiment\.(runner\.)?runtime_env\..*": "Ray's own description of an environment",
    r"experiment\.runner\.cli_args\.engine_args\..*": "typed when they are merged into an item",
    r"experiment\.auto_tuner\.(args_mapping|platform)\..*": "names of options, settings of a platform",
    r"(train|inference)\.(kerv|external)\.(env|arguments)\..*": "another program's variables and arguments",
    r"train\.extra_args.*": "the documented way around the option table",
    r"(train\.data|inference\.generate|serve\.0\.engine_args)\.rename_map\..*": "names in the user's data",
    r".*\.config\.(rename_map|features)\..*": "names in the user's data",
    r"train\.data\.(embodiment_tag_mapping|color_jitter)\..*": "names of robots, of image properties",
    r"train\.model\.optimizer\.param_groups\.[^.]*": "names of modules",
    r"train\.(model\.optimizer\.scheduler\.scheduler_kwargs|trainer\.(scheduler_specific_kwargs|learning_rate|loss_scale))\..*": (
        "arguments of a function of torch; names of modules and data sets"
    ),
    r"train\.datasets\.(vla|vlm)_data.*": "StarVLA's own settings",
    r"serve\.[0-9]+\.engine_args\.anything": "arguments of the user's own class",
    r"serve\.[0-9]+\.engine_args_specific\.(sglang|llama_cpp)\..*": "no option table in this version",
    r"serve\.[0-9]+\.engine_args(_specific\.vllm)?\.(limit.mm.per.prompt|compilation_config)\..*": (
        "vLLM parses this JSON itself"
    ),
    r"inference\.engine\.(pipeline|components\.[a-z]+)\.from_pretrained\..*": "arguments of the class's own loader",
    r"inference\.engine\.components\.[a-z]+": "names of a pipeline's parts",
    r"inference\.generate(\.[0-9]+)?\.extra_args\..*": "the documented way around the contract",
    r"inference\.generate\.images\..*": "names of cameras",
    r"rl\.append_kargs\..*": "keys added to verl's configuration",
    r"experiment\.(node_args|envs\.(node|device_type)_specific)\.[^e].*|(node|device_type)_specific\.[^.]*": "names of hosts",
}
# Where the wrong type of value cannot be seen, beside the above, and why.
ANY_VALUE = {
    r"serve\.[0-9]+\.engine_args(_specific\.vllm)?\.(limit.mm.per.prompt.*|compilation_config)": (
        "vLLM parses this JSON itself"
    ),
    r"experiment\.(runner\.runtime_env|shell_cmds|runner\.deploy\.request\.[0-9]+\.default)": "anything may stand",
    r"train\..*\.(use_mcore_models|wandb-log-model.*|use_dist_ckpt|legacy_tokenizer|no_shared_fs)": "has no effect",
    r"train\.model\.linear_attention_freq": "Megatron evaluates this text itself",
    "|".join(
        rf"rl\.{re.escape(key)}" for key, kind in verl_keys().items() if kind == "any"
    ): "verl's default is null",
    r"rl\.(data\.(train|val)_files|.*\.(path|default_local_dir|project_name|experiment_name|logger).*)": "text or list",
    r".*\.mm_data": "files of any kind",
    r".*\.sparsity_modes": "FlagScale's own, not documented",
    r".*\.device_map": "a name or a mapping of transformers",
}
# Text is a right value where the corpus has a number, or true or false.
TEXT_TOO = re.compile(
    r".*(data\.split|rdzv_id|exp_name|runtime_env|engine_args\.(limit|compilation).*|freeze_modules|actor\.policy_loss.*"
    r"|nodes_envs.*|image_size|search_steps|color_jitter|shell_cmds|lr_decay_iters|total_training_steps)"
)


# ---- keys


def keys() -> list[str]:
    """Return the key paths of `keys.txt`."""
    found = []
    for line in (CORPUS / "keys.txt").read_text(encoding="utf-8").splitlines():
        head, _, names = line.partition(": ")
        if not line.startswith("#"):
            found += [name if head == "(top)" else f"{head}.{name}" for name in names.split()]
    return found


def spread(tree, prefix: str):
    """Yield every path of a tree; the items of a list stand as `[]`."""
    yield prefix
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from spread(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list):
        for item in tree:
            yield from spread(item, f"{prefix}[]")


def corpus_paths() -> set[str]:
    """Return every key path of the corpus, those of task files below their group."""
    found: set[str] = set()
    for path in CORPUS.rglob("*.yaml"):
        group = path.parent.name if path.parent != CORPUS else ""
        found |= set(spread(yaml.load(path.read_text(encoding="utf-8"), get_yaml_loader()), group))
    return found


def test_every_key_of_flagscales_files_is_in_the_corpus():
    paths = "\n".join(sorted(corpus_paths()))
    missing = []
    for key in keys():
        pattern = re.escape(key).replace(r"\*processor", "(pre|post)processor")
        pattern = re.sub("<[A-Za-z]+>", "[^\n]+?", pattern)
        if not re.search(f"^{pattern}$", paths, re.MULTILINE):
            missing.append(key)
    assert not missing
    assert len(keys()) > 1100


# ---- outcomes


def said(root: str) -> list[str]:
    """Return what `check` says about a file of the corpus, notes about the unused entrypoint left out."""
    problems = [problem for problem in check(root) if not problem.key.endswith("task.entrypoint")]
    return [f"{problem.severity}: {problem} [{problem.code}]" for problem in problems]


@pytest.mark.parametrize("root", ROOTS)
def test_each_file_loads_or_is_refused_with_the_right_message(root, monkeypatch):
    monkeypatch.chdir(CORPUS)
    expected = json.loads((CORPUS / "expected.json").read_text(encoding="utf-8"))
    assert said(root) == expected.get(root, [])


def test_only_the_files_meant_to_be_refused_are():
    expected = json.loads((CORPUS / "expected.json").read_text(encoding="utf-8"))
    refused = {root for root, lines in expected.items() if any(line.startswith("error") for line in lines)}
    assert refused == {"train_fork.yaml", "serve_removed.yaml", "placeholders.yaml"}


# ---- mutants


class Leaf:
    """A key and its value in a file of the corpus."""

    def __init__(self, path: tuple, key, value) -> None:
        self.path, self.key, self.value = path, key, value
        self.name = ".".join(map(str, path))
        self.line = key.start_mark.line + 1

    def is_one_of(self, patterns) -> bool:
        return any(re.fullmatch(pattern, self.name) for pattern in patterns)


def leaves_of(node, path: tuple = ()):
    """Yield the leaves below a node: keys whose value is not a mapping, nor a list of mappings."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            is_branch = isinstance(value, yaml.MappingNode) and value.value
            holds_mappings = isinstance(value, yaml.SequenceNode) and any(
                isinstance(item, yaml.MappingNode) for item in value.value
            )
            if is_branch or holds_mappings:
                yield from leaves_of(value, here)
            else:
                yield Leaf(here, key, value)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from leaves_of(item, (*path, index))


def sources(folder: Path):
    """Yield each file of a folder with the experiment file that leads to it.

    What others build on comes last: an experiment of its own shows all of it, theirs may hide a part.
    """
    bases = []
    for path in sorted(folder.glob("*.yaml")):
        yield path.name, path.name
        for choice in defaults(path):
            if isinstance(choice, dict):
                ((group, name),) = choice.items()
                yield path.name, f"{group}/{name}.yaml"
                below = [base for base in defaults(folder / group / f"{name}.yaml") if base != "_self_"]
                bases += [(path.name, f"{group}/{base}.yaml") for base in below]
    yield from bases


def defaults(path: Path) -> list:
    """Return the defaults list of a file."""
    tree = yaml.load(path.read_text(encoding="utf-8"), get_yaml_loader())
    return tree.get("defaults", []) if isinstance(tree, dict) else []


def leaves(folder: Path, file: str) -> list[Leaf]:
    """Return the leaves of a file, by their paths in the composed experiment."""
    node = yaml.compose((folder / file).read_text(encoding="utf-8"), get_yaml_loader())
    group = file.partition("/")[0]
    prefix = (group,) if group in GROUPS else ()
    return [leaf for leaf in leaves_of(node, prefix) if "defaults" not in leaf.path]


def typo(key: str) -> str:
    """Return a key with one letter wrong."""
    middle = len(key) // 2
    return f"{key[:middle]}{'q' if key[middle] != 'q' else 'z'}{key[middle + 1 :]}"


def edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    """Return a text with stretches of it replaced; lines stay where they are."""
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + "\n" * text.count("\n", start, end) + text[end:]
    return text


def value_edit(leaf: Leaf, new: str) -> tuple[int, int, str]:
    start, end = leaf.value.start_mark.index, leaf.value.end_mark.index
    return (start, end, new if start != end else f" {new}")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Return a function that checks a root file of the corpus after one file has been changed."""
    return bench_for(CORPUS, tmp_path_factory.mktemp("mutants") / "corpus")


def bench_for(folder: Path, copy: Path):
    """Return a function that checks a root file of a folder's copy after one file has been changed."""
    shutil.copytree(folder, copy)

    def run(root: str, file: str, edits):
        path = copy / file
        original = path.read_text(encoding="utf-8")
        path.write_text(edited(original, edits), encoding="utf-8")
        try:
            problems = check(copy / root)
        finally:
            path.write_text(original, encoding="utf-8")
        places = {}
        for problem in problems:
            if (
                problem.severity == "error"
                and problem.origin is not None
                and problem.origin.file.endswith(file)
            ):
                places.setdefault(problem.origin.line, []).append(problem)
        return places

    return run


DECISIVE = re.compile(
    r"experiment\.(task\..*|exp_name)|action|.*\.(registry_name|enable_hetero|engine|module|serve_id)|rl\.config-name"
)
"""Keys on which depends what else is looked at: each of their mutants is checked alone."""


MAPPING = "{wrong: type}"

COMMON = re.compile(r"experiment\.(task\..*|exp_name)|action")
"""Keys that mean the same in every file: mutants of them in one file are enough."""


def batches(found: list[Leaf]) -> list[list[Leaf]]:
    """Return leaves in groups whose mutants do not hide each other."""
    together = [leaf for leaf in found if not DECISIVE.fullmatch(leaf.name)]
    return [together, *([leaf] for leaf in found if DECISIVE.fullmatch(leaf.name))]


def unknown_keys(found: list[Leaf]):
    """Yield groups of leaves to misspell, with their edits and the paths that errors must name."""
    for group in batches([leaf for leaf in found if not leaf.is_one_of(OPEN_KEYS)]):
        edits, names = [], []
        for leaf in group:
            new = typo(leaf.key.value)
            start = leaf.key.start_mark.index + (leaf.key.style is not None)
            edits.append((start, start + len(leaf.key.value), new))
            names.append(".".join(map(str, (*leaf.path[:-1], new))))
        yield group, edits, names


def other_kind(leaf: Leaf) -> str:
    """Return a mapping in a list of lists for a list, text for a number or a switch."""
    return "[[{wrong: type}]]" if is_list(leaf) else "wrong-type"


def wrong_types(found: list[Leaf], new: str | None, wanted):
    """Yield groups of leaves to give a wrong value, with their edits and the paths that errors must name."""
    meant = [leaf for leaf in found if wanted(leaf) and not leaf.is_one_of(OPEN_KEYS | ANY_VALUE)]
    for group in batches(meant) if new == MAPPING else batches(meant)[:1]:
        yield (
            group,
            [value_edit(leaf, new or other_kind(leaf)) for leaf in group],
            [leaf.name for leaf in group],
        )


def is_number(leaf: Leaf) -> bool:
    return leaf.value.tag.rpartition(":")[2] in {"int", "float", "bool"} and not TEXT_TOO.fullmatch(leaf.name)


def is_list(leaf: Leaf) -> bool:
    return isinstance(leaf.value, yaml.SequenceNode)


def mutants(folder: Path = CORPUS):
    """Yield (root, file, kind, leaves, edits, names) of all mutants, those that can go together in one."""
    seen, decided = set(), set()
    for root, file in sources(folder):
        if file in seen:
            continue
        seen.add(file)
        found = [leaf for leaf in leaves(folder, file) if leaf.name not in decided]
        decided |= {leaf.name for leaf in found if COMMON.fullmatch(leaf.name)}
        for item in unknown_keys(found):
            yield (root, file, "unknown key", *item)
        if not any(word in file for word in REFUSED):
            for item in wrong_types(found, MAPPING, lambda leaf: True):
                yield (root, file, "mapping", *item)
            for item in wrong_types(found, None, lambda leaf: is_number(leaf) or is_list(leaf)):
                yield (root, file, "kind", *item)


def names_outer(problem, name: str) -> bool:
    """Whether a problem is about the option that a dotted key (`limit_mm_per_prompt.image`) belongs to."""
    return name.endswith(".image") and problem.key == name.removesuffix(".image")


def survivors(run, batch) -> list[str]:
    """Return the mutants of a batch about which no error stands at their line and key."""
    root, file, kind, group, edits, names = batch
    places = run(root, file, edits) if group else {}
    alive = []
    for leaf, written in zip(group, names, strict=True):
        here = places.get(leaf.line, [])
        name = written.replace("experiment.deploy.", "experiment.runner.deploy.")  # where it is read
        meant = [
            problem
            for problem in here
            if f"{problem.key}.".startswith(f"{name}.") or names_outer(problem, name)
        ]
        if kind == "unknown key" and file != "train/fork.yaml":  # families of options are refused there
            meant = [problem for problem in meant if problem.code == "config/unknown-key"]
        if not meant:
            alive.append(f"{file}:{leaf.line}: {kind}: {name}")
    return alive


def test_every_mutant_is_caught_at_its_line(bench):
    alive, count = [], 0
    for batch in mutants():
        alive += survivors(bench, batch)
        count += len(batch[3])
    assert not alive
    assert count >= 2000, count


def test_a_mutant_alone_is_caught_and_nothing_else_is_said_about_other_files(bench):
    """Mutants go together above; a sample of them alone shows that they do not need each other."""
    alive = []
    singles = [
        (root, file, kind, [leaf], [edit], [name])
        for root, file, kind, group, edits, names in mutants()
        for leaf, edit, name in zip(group, edits, names, strict=True)
    ]
    for batch in singles[::60]:
        alive += survivors(bench, batch)
    assert not alive


if __name__ == "__main__":
    import os

    os.chdir(CORPUS)
    outcomes = {root: lines for root in ROOTS if (lines := said(root))}
    Path("expected.json").write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
