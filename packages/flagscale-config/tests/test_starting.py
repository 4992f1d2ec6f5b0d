"""An experiment of one's own, copied from a recipe."""

import json

import pytest

from flagscale_config import ConfigError, cli, load, new


def test_a_recipe_is_copied_in_two_levels(tiny, tmp_path):
    copies = new(tiny, tmp_path / "mine")
    assert [str(path.relative_to(tmp_path)) for path in copies] == [
        "mine/conf/tiny.yaml",
        "mine/conf/train/tiny.yaml",
    ]
    assert copies[0].read_text() == (tmp_path / tiny).read_text()
    assert load(copies[0]).train == load(tiny).train


def test_nothing_is_overwritten(tiny, tmp_path):
    (tmp_path / "mine/conf/train").mkdir(parents=True)
    (tmp_path / "mine/conf/train/tiny.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="exists already") as caught:
        new(tiny, tmp_path / "mine")
    assert [problem.code for problem in caught.value.problems] == ["config/write"]
    assert not (tmp_path / "mine/conf/tiny.yaml").exists()


def test_the_command_says_how_to_go_on(tiny, capsys):
    assert cli.main(["new", tiny, "mine"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote mine/conf/tiny.yaml",
        "wrote mine/conf/train/tiny.yaml",
        "next: flagscale-config check mine/conf/tiny.yaml",
        "next: flagscale-train run mine/conf/tiny.yaml",
    ]
    assert cli.main(["new", "--json", tiny, "other"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0] == "other/conf/tiny.yaml"


def test_a_directory_that_cannot_be_made_is_named(tiny, capsys):
    assert cli.main(["new", tiny, "conf/tiny.yaml"]) == 2
    assert "cannot be written" in capsys.readouterr().err
