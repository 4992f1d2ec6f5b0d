"""Composition equals `hydra.compose`, file by file and override by override."""

import re
import warnings
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from flagscale_config.compose import compose
from flagscale_config.errors import ConfigError

FILES = Path(__file__).parent / "corpus"
CORPUS = {
    "self_first": {
        "conf/a.yaml": "defaults: [_self_, {train: x}]\ntrain: {model: {lr: 1, keep: 2}}\n",
        "conf/train/x.yaml": "model: {lr: 3, new: [1, 2]}\n",
    },
    "self_last": {
        "conf/a.yaml": "defaults: [{train: x}, _self_]\ntrain: {model: {lr: 1, keep: 2}}\n",
        "conf/train/x.yaml": "model: {lr: 3, new: [1, 2]}\n",
    },
    "self_missing": {
        "conf/a.yaml": "defaults: [{train: x}]\ntrain: {model: {lr: 1}}\n",
        "conf/train/x.yaml": "model: {lr: 3}\n",
    },
    "nested_defaults": {
        "conf/a.yaml": "defaults: [_self_, {compress: w4}]\nk: 1\n",
        "conf/compress/w4.yaml": "defaults: [model, _self_]\nscheme: W4A16\nmodel_cls: mine\n",
        "conf/compress/model.yaml": "model_cls: Auto\ndevice: cpu\n",
    },
    "three_levels": {
        "conf/a.yaml": "defaults: [_self_, {train: x}]\n",
        "conf/train/x.yaml": "defaults: [_self_, {optimizer: adam}]\nmodel: {lr: 1}\n",
        "conf/train/optimizer/adam.yaml": "lr: 2\nbetas: [0.9, 0.95]\n",
    },
    "plain_path": {
        "conf/a.yaml": "defaults: [_self_, train/deep/x]\n",
        "conf/train/deep/x.yaml": "lr: 1e-5\n",
    },
    "several_groups": {
        "conf/a.yaml": "defaults: [_self_, {train: x}, {serve: y}]\n",
        "conf/train/x.yaml": "lr: 1\n",
        "conf/serve/y.yaml": "z: {a: '${train.lr}'}\n",
    },
    "group_list": {
        "conf/a.yaml": "defaults: [_self_, {train: [x, y]}]\n",
        "conf/train/x.yaml": "lr: 1\na: 1\n",
        "conf/train/y.yaml": "lr: 2\n",
    },
    "optional": {"conf/a.yaml": "defaults: [_self_, optional train: nothing]\nk: 1\n"},
    "override_keyword": {
        "conf/a.yaml": "defaults: [base, override train: y, _self_]\n",
        "conf/base.yaml": "defaults: [{train: x}]\nb: 1\n",
        "conf/train/x.yaml": "lr: 1\n",
        "conf/train/y.yaml": "lr: 2\n",
    },
    "package_at": {
        "conf/a.yaml": "defaults: [_self_, train@first.place: x]\nfirst: {k: 1}\n",
        "conf/train/x.yaml": "lr: 1\n",
    },
    "package_header": {
        "conf/a.yaml": "defaults: [_self_, {train: x}]\nlr: 0\n",
        "conf/train/x.yaml": "# @package _global_\nlr: 1\nother: {a: 1}\n",
    },
    "choice_by_interpolation": {
        "conf/a.yaml": "defaults: [_self_, {train: x}, {size: '${train}_big'}]\n",
        "conf/train/x.yaml": "lr: 1\n",
        "conf/size/x_big.yaml": "n: 1\n",
    },
    "types": {
        "conf/a.yaml": (
            "a: 1e-5\nb: 1E6\nc: 0x10\nd: 010\ne: yes\nf: 2024-01-01\ng: 22:30\nh: ~\ni: null\nj: None\n"
            "k: '1'\nl: .5\nm: +1\nn: 1_000\no: .inf\np: [1, [2, {q: 3}]]\nr: ''\ns: {}\nt: []\nu: 1.\n"
            "v: on\nw: |\n  two\n  lines\n"
        )
    },
    "anchors": {
        "conf/a.yaml": (
            "base: &b {x: 1, y: {z: 2}}\nmine:\n  <<: *b\n  x: 3\n"
            "late:\n  x: 4\n  <<: [*b, {y: 5, w: 6}]\nsame: *b\n"
        )
    },
    "interpolation": {
        "conf/a.yaml": (
            "experiment: {exp_name: n, exp_dir: 'out/${experiment.exp_name}'}\n"
            "v: ${experiment}\nw: ${oc.env:FLAGSCALE_SURELY_UNSET,7}\nx: a${w}b\nl: ['${x}', '${.1}', 3]\n"
        )
    },
    "odd_keys": {"conf/a.yaml": "observation.images.cam: {1: a, true: b}\nx-y: 1\n'a/b': 2\n"},
    "null_parts": {
        "conf/a.yaml": "defaults: [_self_, {train: x}]\ntrain: {model: {lr: 1}, data: null}\n",
        "conf/train/x.yaml": "model: null\ndata: {path: p}\n",
    },
    "list_below_key": {
        "conf/a.yaml": "defaults: [_self_, {serve: y}]\n",
        "conf/serve/y.yaml": "- serve_id: m\n  engine_args: {model: x}\n- serve_id: n\n",
    },
    "empty_group": {"conf/a.yaml": "defaults: [_self_, {train: x}]\nk: 1\n", "conf/train/x.yaml": ""},
    "replaced_list": {
        "conf/a.yaml": "defaults: [_self_, {train: x}]\ntrain: {l: [1, 2, 3], d: {a: 1}}\n",
        "conf/train/x.yaml": "l: [9]\nd: null\n",
    },
}

OVERRIDDEN = {
    "conf/a.yaml": (
        "defaults: [_self_, {train: x}]\n"
        "experiment: {exp_name: n, seed: 1, envs: {A: 1}, l: [1, 2], 'with.dot': 1}\n"
    ),
    "conf/train/x.yaml": "model: {lr: 1, layers: 2, opt: {beta: 0.9}}\n",
    "conf/train/y.yaml": "model: {lr: 5}\nextra: 1\n",
}

OVERRIDES = [
    ["train=y"],
    ["train.model.lr=2"],
    ["train.model.lr=1e-4"],
    ["train.model.lr='1e-4'"],
    ["+train.model.new=3"],
    ["++train.model.lr=3", "++train.a.b.c=4"],
    ["~train.model.lr"],
    ["~train.model.lr=1"],
    ["~train.model"],
    ["~train"],
    ["experiment.l=[3,4,[5]]"],
    ["experiment.l=[]"],
    ["experiment.l.1=9"],
    ["experiment.envs={A:2}"],
    ["+experiment.envs={B:{C:1}}"],
    ["+experiment.envs.B='x=y, z'"],
    ["experiment.exp_name=null"],
    ["experiment.exp_name=${experiment.seed}"],
    ["experiment.exp_name='a b'", 'experiment.seed="7"'],
    ["experiment.exp_name=a\\ b"],
    ["experiment.exp_name=int(3)", "experiment.seed=str(4)"],
    ["experiment.exp_name=/a/b:c@d%e+f?g|h"],
    ["experiment.exp_name="],
    ["experiment.exp_name=true", "experiment.seed=1.5"],
    ["train.model={lr:7}"],
    ["train=y", "train.extra=2", "+train.model.more=1"],
    ["experiment.seed=1", "experiment.seed=2"],
    ["+new.tree.deep=1"],
]

REFUSED = [
    ["train.model.lrr=2"],
    ["+train.model.lr=2"],
    ["~train.model.nothing"],
    ["~train.model.lr=99"],
    ["experiment.l[9]=1"],
    ["experiment.l[0]=9"],
    ["experiment.envs={A:2,B:three}"],
    ["nothing=1"],
    ["train=missing"],
    ["train=1"],
    ["train=null"],
    ["train=[1]"],
    ["a=[1"],
    ["train.model.lr=1,2"],
    ["group/x=y"],
    ["train.model.lr.deeper=1"],
]


@pytest.fixture(autouse=True)
def _hydra_is_closed():
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def by_hydra(path: Path, overrides: list[str]) -> object:
    """Return what `hydra.compose` makes of a file, without its own settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with initialize_config_dir(version_base=None, config_dir=str(path.parent.absolute())):
            config = hydra_compose(path.stem, overrides=overrides)
    return OmegaConf.to_container(config, resolve=False)


@pytest.mark.parametrize("name", CORPUS)
def test_a_file_composes_as_by_hydra(name, project):
    path = project(CORPUS[name])
    ours = compose(path)
    assert OmegaConf.to_container(ours.config, resolve=False) == by_hydra(path, [])


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.glob("*.yaml")))
def test_a_file_of_the_corpus_composes_as_by_hydra(name):
    ours = OmegaConf.to_container(compose(FILES / name).config, resolve=False)
    ours.pop("hydra", None)
    assert ours == as_we_read(by_hydra(FILES / name, []))


def as_we_read(tree):
    """Return Hydra's values with the two spellings of older files that we read as what they mean today."""
    if isinstance(tree, dict):
        return {key: as_we_read(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [as_we_read(value) for value in tree]
    if isinstance(tree, str):
        is_required = re.fullmatch(r"\$\{[a-z_.]+:\?\?\}", tree)
        return "???" if is_required else tree.replace("${env:", "${oc.env:")
    return tree


@pytest.mark.parametrize("name", CORPUS)
def test_every_composed_value_has_a_place_in_a_file(name, project):
    path = project(CORPUS[name])
    ours = compose(path)

    def leaves(tree, at=()):
        if isinstance(tree, dict) and tree:
            for key, value in tree.items():
                yield from leaves(value, (*at, str(key)))
        else:
            yield at

    for leaf in leaves(OmegaConf.to_container(ours.config, resolve=False)):
        origin = ours.origin(leaf)
        text = Path(origin.file).read_text().splitlines()
        assert origin.line >= 1
        assert text == [] or text[origin.line - 1]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=" ".join)
def test_overrides_apply_as_by_hydra(overrides, project):
    path = project(OVERRIDDEN)
    ours = compose(path, overrides)
    assert [problem for problem in ours.problems if problem.severity == "error"] == []
    assert OmegaConf.to_container(ours.config, resolve=False) == by_hydra(path, overrides)


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_overrides_hydra_refuses_are_refused_by_name(overrides, project):
    path = project(OVERRIDDEN)
    with pytest.raises(Exception):  # noqa: B017  whatever Hydra raises
        by_hydra(path, overrides)
    try:
        problems = compose(path, overrides).problems
    except ConfigError as error:
        problems = list(error.problems)
    assert problems
    assert all(problem.origin.override == overrides[0] for problem in problems)


def test_origins_follow_the_merge(project):
    path = project(OVERRIDDEN)
    ours = compose(path, ["train.model.lr=2", "+train.model.tree={a:{b:1}}", "~experiment.seed"])
    assert str(ours.origin(("train", "model", "layers"))) == "conf/train/x.yaml:1:16"
    assert str(ours.origin(("train", "model", "lr"))) == "override 'train.model.lr=2'"
    assert str(ours.origin(("train", "model", "tree", "a", "b"))) == "override '+train.model.tree={a:{b:1}}'"
    assert str(ours.origin(("experiment", "seed"))) == "conf/a.yaml:2:1"  # deleted: the section around it


def test_the_winning_file_is_the_origin(project):
    first = compose(project(CORPUS["self_first"]))
    assert first.origin(("train", "model", "lr")).file == "conf/train/x.yaml"
    assert first.origin(("train", "model", "keep")).file == "conf/a.yaml"
    last = compose(project(CORPUS["self_last"]))
    assert last.origin(("train", "model", "lr")).file == "conf/a.yaml"


def test_replaced_lists_leave_no_places_behind(project):
    ours = compose(project(CORPUS["replaced_list"]))
    assert ours.origin(("train", "l", 2)).file == "conf/train/x.yaml"
    assert ours.origin(("train", "d", "a")).file == "conf/train/x.yaml"


def test_a_mapping_and_a_list_do_not_merge(project):
    path = project(
        {
            "conf/a.yaml": "defaults: [_self_, {train: x}]\ntrain:\n  d: {a: 1}\n",
            "conf/train/x.yaml": "c: 1\nd: [1]\n",
        }
    )
    with pytest.raises(ConfigError) as caught:
        compose(path)
    assert str(caught.value) == (
        "conf/train/x.yaml:2:1: train.d: is a mapping in one place and a list in the other "
        "(conf/a.yaml:3:3); they cannot be merged"
    )


def test_a_programs_own_hydra_version_is_left_alone(project):
    from hydra import version

    path = project(CORPUS["self_first"])
    state = version.VersionBase.instance()
    before = state.version_base
    state.version_base = version._get_version("1.2")
    try:
        compose(path)
        assert version.getbase() == version._get_version("1.2")
    finally:
        state.version_base = before


def test_hydras_own_settings_are_ignored(project):
    path = project(OVERRIDDEN)
    assert compose(path, ["hydra.run.dir=x", "hydra/launcher=basic"]).problems == []


def test_a_missing_self_is_noted(project):
    (note,) = compose(project(CORPUS["self_missing"])).problems
    assert (note.code, note.severity, note.origin.line) == ("config/no-self", "note", 1)
