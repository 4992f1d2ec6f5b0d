"""Any small tree of files and any overrides compose as by `hydra.compose`, or both refuse."""

import warnings
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flagscale_config.compose import compose
from flagscale_config.errors import ConfigError

QUIET = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
REFUSED = "refused"

KEYS = st.sampled_from(["a", "b", "lr", "model", "train", "serve", "x"])
TEXTS = st.sampled_from(
    [
        "t",
        "",
        "1e-5",
        "null",
        "yes",
        "22:30",
        "0123",
        "a b",
        "${lr}",
        "${..a}",
        "x${a}y",
        "${oc.env:HOME,1}",
        "\\${a}",
        "'q'",
        "x,y",
        "a=b",
        "{",
        "[1",
        "???",
        "${oc.decode:'[1,2]'}",
        "$",
        "é",
        "- x",
    ]
)
LEAVES = st.none() | st.booleans() | st.integers(-3, 10**12) | st.sampled_from([0.5, 1e-5, -1e20]) | TEXTS
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
BODIES = st.dictionaries(KEYS, VALUES, max_size=3)

# Every file that may exist, by the group folder and the name that a defaults list has for it.
FILES = ("train/x", "train/y", "serve/x", "train/deep/x", "train/deep/y", "base")
GROUPS = ("train", "serve", "deep", "train/deep", "/train", "/train/deep", "nothing")
NAMES = st.sampled_from(["x", "y", "missing", "${train}", "deep/x"])
PACKAGES = st.sampled_from(["", "", "", "@_global_", "@_here_", "@p.q", "@_group_", "@train", "@_global_.p"])
PREFIXES = st.sampled_from(["", "", "", "", "optional ", "override "])


@st.composite
def entries(draw):
    """Return an entry of a defaults list."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from(["base", "train/x", "/train/x", "deep/x", "/base", "base@p", "missing"]))
    key = draw(PREFIXES) + draw(st.sampled_from(GROUPS)) + draw(PACKAGES)
    choice = draw(NAMES | st.none() | st.just("???") | st.lists(NAMES, max_size=2))
    return {key: choice}


@st.composite
def files(draw):
    """Return the text of a file: a package header now and then, a defaults list, a body."""
    body = dict(draw(BODIES))
    if draw(st.booleans()):
        listed = draw(st.lists(entries(), max_size=3))
        if draw(st.booleans()):
            listed.insert(draw(st.integers(0, len(listed))), "_self_")
        body = {"defaults": listed, **body}
    header = draw(
        st.sampled_from(["", "", "", "", "# @package _global_\n", "# @package p.q\n", "# @package _group_\n"])
    )
    return header + yaml.safe_dump(body, sort_keys=False, allow_unicode=True)


PATHS = st.sampled_from(
    [
        "a",
        "b",
        "lr",
        "model",
        "train",
        "serve",
        "x",
        "a.b",
        "train.lr",
        "train.a",
        "train.x.a",
        "model.lr",
        "p.q",
        "p.q.a",
        "a.0",
        "a[0]",
        "a[b]",
        "train@p",
        "train/deep",
        "train@train",
        "serve@a:b",
        "train.deep.lr",
        "base",
        "train.new",
    ]
)
GIVEN = st.sampled_from(
    [
        "1",
        "1e-5",
        "null",
        "true",
        "x",
        "y",
        "missing",
        "[1,2]",
        "[x,y]",
        "{a:1}",
        "{a:{b:[1,x]}}",
        "'a b'",
        '"q\\"q"',
        "",
        "''",
        "${lr}",
        "${train.lr}",
        "a\\ b",
        "a\\,b",
        "1,2",
        "range(1,3)",
        "int(2)",
        "str(1)",
        "x=y",
        "a:b",
        "[",
        "{",
        "???",
        "-1",
        "+1",
        ".5",
        "1_000",
        "0x1F",
        "nan",
        "inf",
        "yes",
        "22:30",
        "0123",
        "$",
        "$x",
        "é",
        "a b",
        " x ",
        "*",
        "%",
        "???x",
    ]
)


@st.composite
def overrides(draw):
    """Return an override."""
    sign = draw(st.sampled_from(["", "", "", "+", "++", "~"]))
    value = "" if sign == "~" and draw(st.booleans()) else "=" + draw(GIVEN)
    return sign + draw(PATHS) + value


@pytest.fixture(autouse=True)
def _hydra_is_closed():
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def by_hydra(folder: Path, name: str, given: list[str]):
    """Return what `hydra.compose` makes of a file, or that it refuses."""
    GlobalHydra.instance().clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with initialize_config_dir(version_base=None, config_dir=str(folder.absolute())):
                return OmegaConf.to_container(hydra_compose(name, overrides=given), resolve=False)
        except Exception:  # noqa: BLE001  it has no one kind of error, and some are bare
            return REFUSED


def by_us(path: Path, given: list[str]):
    """Return what we make of it, or that we refuse, and the problems."""
    try:
        composed = compose(path, given)
    except ConfigError as error:
        return REFUSED, error.problems
    errors = [problem for problem in composed.problems if problem.severity == "error"]
    return (REFUSED if errors else OmegaConf.to_container(composed.config, resolve=False)), errors


def write(folder: Path, tree: dict[str, str]) -> None:
    """Replace the files of the folder."""
    for old in sorted(folder.rglob("*.yaml")):
        old.unlink()
    for name, text in tree.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@QUIET
@given(
    root=files(),
    tree=st.dictionaries(st.sampled_from(FILES), files(), max_size=5),
    given_=st.lists(overrides(), max_size=3),
)
def test_any_files_and_overrides_compose_as_by_hydra(root, tree, given_, tmp_path):
    write(tmp_path / "conf", {"a": root, **tree})
    theirs = by_hydra(tmp_path / "conf", "a", given_)
    ours, problems = by_us(tmp_path / "conf" / "a.yaml", given_)
    assert ours == theirs, [str(problem) for problem in problems]
