"""The search of engine options: what is tried, what is spared, what is kept."""

from __future__ import annotations

import json

import pytest

from flagscale_serve.errors import InvalidService
from flagscale_serve.tune import parse_space

ITEM = """
- serve_id: a
  engine: vllm
  engine_args: {{model: {model}, served_model_name: m, max_num_seqs: 2}}
"""
WORDS = ("--try", "max_num_seqs=64,3,many", "--generator", "own", "--concurrency", 2)
LOAD = ("--requests", 4, "--warmups", 0, "--input-len", 4, "--output-len", 4)


def fates(folder) -> list[tuple[dict, str]]:
    lines = (folder / "tune.jsonl").read_text().splitlines()[1:]
    return [(one["options"], one["fate"]) for one in map(json.loads, lines)]


def test_the_best_options_are_found_written_and_not_searched_for_twice(shell, serve_file, model_dir):
    path, out = serve_file(ITEM.format(model=model_dir)), shell.home / "out"
    words = ("tune", path, *WORDS, *LOAD, "--out", out)
    done = shell(*words)
    assert done.returncode == 0, done.stderr
    assert fates(out) == [
        ({}, "measured"),
        ({"max_num_seqs": 64}, "measured"),
        ({"max_num_seqs": 3}, "stopped early"),
        ({"max_num_seqs": "many"}, "refused"),
    ]
    assert len(shell.engine_pids()) == 3  # what is refused is never started
    assert done.stdout.startswith("best: max_num_seqs=64: ")
    assert str(out / "best.yaml") in done.stdout
    assert "max_num_seqs=many: refused: " in done.stderr
    (process,) = json.loads(shell("plan", out / "best.yaml", "--json").stdout)["processes"]
    assert process["argv"][process["argv"].index("--max-num-seqs") + 1] == "64"
    assert (out / "best.yaml").read_text().startswith("# The best of 4 trials by flagscale-serve tune: ")

    # Half a line, as a kill leaves it: that trial alone is made again.
    journal = out / "tune.jsonl"
    journal.write_text(journal.read_text()[:-20])
    again = shell(*words)
    assert again.returncode == 0, again.stderr
    assert "4 trials, 3 of them before" in again.stderr
    assert len(shell.engine_pids()) == 3

    other = shell(*words, "--seed", 9)
    assert other.returncode == 2
    assert "of another search" in other.stderr


def test_a_file_that_cannot_be_served_is_no_search(shell, serve_file, model_dir):
    path = serve_file(ITEM.format(model=model_dir / "nowhere"))
    done = shell("tune", path, *WORDS, *LOAD, "--out", shell.home / "out")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert shell.engine_pids() == []


def test_values_are_read_as_what_they_are():
    assert parse_space(["max-num-seqs=64,128", "dtype=auto,float16", "enforce_eager=true"]) == {
        "max_num_seqs": [64, 128],
        "dtype": ["auto", "float16"],
        "enforce_eager": [True],
    }
    for wrong in ([], ["a"], ["=1"], ["a="], ["a=1,,2"], ["a=1", "a=2"]):
        with pytest.raises(InvalidService, match="try"):
            parse_space(wrong)
