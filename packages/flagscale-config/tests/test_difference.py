"""Two experiments compared by what they ask for, not by how they say it."""

import json

import pytest

from flagscale_config import cli, diff


def names(found):
    return [(each.kind, each.name, each.before, each.after) for each in found]


def test_values_are_compared_whatever_the_spelling(tiny, edited):
    assert diff(tiny, tiny) == ()
    assert diff(tiny, tiny, (), ["train.model.seq_length='128'"]) == ()
    assert diff(tiny, tiny, (), ["~train.model.seq_length", "+train.system.seq-length=128"]) == ()


def test_an_engines_default_written_out_is_no_difference(tiny):
    assert diff(tiny, tiny, (), ["+train.model.context_parallel_size=1"]) == ()
    (found,) = diff(tiny, tiny, (), ["+train.model.context_parallel_size=2"])
    assert (found.kind, found.before, found.after, found.origin_before) == ("changed", 1, 2, None)


def test_added_removed_and_changed_have_both_places(tiny):
    found = diff(
        tiny,
        tiny,
        ["+experiment.envs.A=1"],
        ["train.model.num_layers=4", "+experiment.envs.B=2"],
    )
    assert sorted(names(found), key=str) == [
        ("added", "experiment.envs.B", None, 2),
        ("changed", "train.num_layers", 2, 4),
        ("removed", "experiment.envs.A", 1, None),
    ]
    (changed,) = (each for each in found if each.kind == "changed")
    assert str(changed.origin_before) == "conf/train/tiny.yaml:5:3"
    assert str(changed.origin_after) == "override 'train.model.num_layers=4'"


def test_serve_items_are_matched_by_id(project):
    head = "experiment: {exp_name: x, task: {type: serve}}\nserve:\n"
    one, two = "- {serve_id: a, engine_args: {port: 1}}\n", "- {serve_id: b, engine_args: {port: 2}}\n"
    project({"1.yaml": head + one + two, "2.yaml": head + two + one.replace("port: 1", "port: 3")})
    assert names(diff("1.yaml", "2.yaml")) == [("changed", "serve.a.engine_args.port", 1, 3)]


def test_secrets_differ_without_being_shown(tiny):
    one, two = (["+experiment.envs.HF_TOKEN=" + word] for word in ("secret-one", "secret-two"))
    (found,) = diff(tiny, tiny, one, two)
    assert (found.before, found.after) == ("***", "***")
    assert "secret" not in json.dumps(found.to_dict())


def test_the_command_prints_both_sides(tiny, capsys):
    assert cli.main(["diff", tiny, tiny]) == 0
    assert capsys.readouterr().out == "equal\n"
    words = ["diff", tiny, tiny, "-b", "train.model.num_layers=4"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "- train.num_layers: 2    # conf/train/tiny.yaml:5:3",
        "+ train.num_layers: 4    # override 'train.model.num_layers=4'",
    ]
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["after"] == 4


@pytest.mark.parametrize(
    ("override", "code"), [("train.model.num_layers=4", 3), ("train.model.num_layers=2", 0)]
)
def test_scripts_may_ask_for_an_exit_code(override, code, tiny):
    assert cli.main(["diff", tiny, tiny, "--exit-code", "--override-b", override]) == code


def test_files_that_cannot_be_composed_are_refused(tiny, capsys):
    assert cli.main(["diff", tiny, "none.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err
