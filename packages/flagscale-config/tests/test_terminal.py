"""Problems on a terminal: the source line with a mark, colours, and no secret."""

import json

import pytest

from flagscale_config import cli
from flagscale_config.errors import Origin, Problem
from flagscale_config.terminal import report

BARE = """
experiment:
  exp_name: x
  task: {type: serve}
  runner: {runtime_env: {HF_TOKEN: verysecret}, master_addr: 密码, nods: 1}
serve:
  - serve_id: m
    engine_args: {modle: Qwen}
"""


@pytest.fixture
def demo(project):
    project({"demo.yaml": BARE})
    return "demo.yaml"


def test_the_source_line_is_shown_with_a_mark_under_the_place(demo, capsys):
    assert cli.main(["check", demo, "--format", "full"]) == 2
    err, key = capsys.readouterr().err.splitlines(), "experiment.runner.nods"
    assert err[:4] == [
        f"error: demo.yaml:4:66: {key}: unknown key; did you mean nnodes? [config/unknown-key]",
        "  |",
        "4 |   runner: {runtime_env: {HF_TOKEN: ***}, master_addr: 密码, nods: 1}",
        # Two letters of two columns each stand before the place, and the secret is shorter than it was.
        "  |                                                             ^^^^",
    ]
    assert err[4].startswith("error: demo.yaml:7:19: serve.0.engine_args.modle: unknown option of vllm")
    assert err[6:8] == ["7 |     engine_args: {modle: Qwen}", "  |                   ^^^^^"]


def test_lines_are_for_machines_and_quiet_prints_errors_only(demo, capsys):
    assert cli.main(["check", demo, "--quiet", "--format", "full"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 2
    assert all(line.startswith("error: demo.yaml:") for line in captured.err.splitlines())


def test_colours_follow_the_conventions(demo, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    cli.main(["check", demo])
    assert "\x1b[1;31merror:\x1b[0m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["check", demo])
    assert "\x1b" not in capsys.readouterr().err


def test_the_summary_counts_files_and_problems(tiny, demo, capsys):
    assert cli.main(["check", demo, tiny]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"{tiny}: ok\n"
    assert captured.err.splitlines()[-1] == "2 files: 1 ok, 1 with errors (2 errors, 0 notes)"
    assert cli.main(["check", "--json", demo, tiny]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [found[name]["ok"] for name in (demo, tiny)] == [False, True]


def test_options_may_stand_between_files_and_overrides(tiny, demo, capsys):
    assert cli.main(["check", tiny, "--json", demo, "experiment.exp_name=y"]) == 2
    assert list(json.loads(capsys.readouterr().out)) == [tiny, demo]
    assert cli.main(["check", "a.b=c"]) == 2
    assert "no file to check" in capsys.readouterr().err


def test_a_file_whose_name_looks_like_an_override_is_a_file(project, capsys):
    project({"a=b.yaml": BARE})
    assert cli.main(["check", "a=b.yaml"]) == 2
    assert "a=b.yaml: 2 errors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "place", "shown", "mark"),
    [
        ("\tkey: 1\n", (1, 2), "1 |  key: 1", "  |  ^^^"),
        ("a: 1\r\nkey: 2\r\n", (2, 1), "2 | key: 2", "  | ^^^"),
        ("key: \x1b[31mred\n", (1, 1), "1 | key: \N{REPLACEMENT CHARACTER}[31mred", "  | ^^^"),
        ("'a key': 1\n", (1, 1), "1 | 'a key': 1", "  | ^^^^^^^"),
        ("x: " + "y" * 300 + "\n", (1, 1), "1 | x: " + "y" * 97 + "...", "  | ^"),
        ("x" * 300 + " key: 1\n", (1, 302), "1 | ..." + "x" * 32 + " key: 1", "  | " + " " * 36 + "^^^"),
    ],
)
def test_odd_lines_are_shown_as_one_line(content, place, shown, mark, project, capsys):
    project({"odd.yaml": content.encode()})
    report([Problem(code="config/value", message="x", origin=Origin("odd.yaml", *place))], "full")
    assert capsys.readouterr().err.splitlines()[2:] == [shown, mark]


@pytest.mark.parametrize(
    "origin", [Origin("gone.yaml", 1, 1), Origin("odd.yaml", 9, 1), Origin("\0", 1, 1), None]
)
def test_without_a_source_line_none_is_shown(origin, project, capsys):
    project({"odd.yaml": b"a: 1\n"})
    report([Problem(code="config/value", message="x", origin=origin)], "full")
    assert len(capsys.readouterr().err.splitlines()) == 1
