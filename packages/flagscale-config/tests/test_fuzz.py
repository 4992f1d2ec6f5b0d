"""No bytes and no keys bring anything but located problems."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flagscale_config import check, option_table
from flagscale_config.errors import Problem

QUIET = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

GOOD = b"""experiment: {exp_name: a, exp_dir: 'o/${experiment.exp_name}', task: {type: serve}}
serve:
  - serve_id: m
    engine_args: {model: x, max_model_len: 1e3, served_model_name: [a, b]}
action: run
"""


def located(problems):
    assert all(isinstance(problem, Problem) for problem in problems)
    for problem in problems:
        assert problem.code.startswith("config/")
        assert problem.origin is not None
        assert "\n" not in str(problem)
        json.dumps(problem.to_dict())


@QUIET
@given(cut=st.integers(0, len(GOOD)), junk=st.binary(max_size=4), keep=st.booleans())
@example(cut=12, junk=b"\t", keep=True)
@example(cut=60, junk=b"${", keep=True)
@example(cut=70, junk=b"*a", keep=True)
def test_corrupted_bytes_are_refused_politely(cut, junk, keep, project):
    project({"e.yaml": GOOD[:cut] + junk + (GOOD[cut:] if keep else b"")})
    located(check("e.yaml"))


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["???", "${a}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "exp_name",
        "exp_dir",
        "task",
        "runner",
        "envs",
        "cmds",
        "deploy",
        "seed",
        "node_args",
        "auto_tuner",
        "x",
    ]
)


@QUIET
@example(section={"deploy": {}, "runner": []}, task={"type": "train"}, body=None)
@given(section=st.dictionaries(KEYS, TREES, max_size=4), task=TREES | st.just({"type": "train"}), body=TREES)
def test_any_values_under_any_keys(section, task, body, project):
    tree = {"experiment": {"exp_name": "a", "task": task, **section}, "train": body, "serve": body}
    project({"e.yaml": json.dumps(tree).encode()})
    located(check("e.yaml"))


OPTIONS = st.sampled_from(sorted(option_table("megatron").options))


@QUIET
@example(options={"no_rope_freq": ["???"]})
@given(options=st.dictionaries(OPTIONS, TREES, max_size=5))
def test_any_value_for_any_option(options, project):
    tree = {
        "experiment": {"exp_name": "a", "task": {"type": "train", "backend": "megatron"}},
        "train": {"model": {"micro_batch_size": 1, **options}},
    }
    project({"e.yaml": json.dumps(tree).encode()})
    located(check("e.yaml"))


@QUIET
@given(override=st.text(max_size=20) | st.from_regex(r"[~+]{0,2}[a-z.@/]{1,12}=[\[\]{}:,a-z0-9$'\"\\]{0,8}"))
def test_any_override(override, project):
    project({"e.yaml": GOOD})
    located(check("e.yaml", [override]))


@pytest.mark.parametrize("name", sorted(option_table("vllm").options)[::9])
def test_options_misspelt_by_one_letter_are_found_again(name, project):
    wrong = name[:-2] + name[-1] if len(name) > 5 else name + "x"
    project({"e.yaml": GOOD.replace(b"max_model_len", wrong.encode())})
    table = option_table("vllm")
    found = [problem for problem in check("e.yaml") if problem.code == "config/unknown-key"]
    if wrong not in table:
        assert len(found) == 1
        assert "did you mean" in found[0].message or len(name) <= 5
        assert found[0].origin.line == 4
