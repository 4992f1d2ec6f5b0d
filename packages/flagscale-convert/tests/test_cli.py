"""The command line: exit codes, output, speed of `--help`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from flagscale_convert.cli import main


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_destination_that_cannot_be_made_is_wrong_input(make, shape, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "out"
    code, _, err = run(capsys, "run", make.megatron(shape()), where, "--to", "hf")
    assert code == 2
    assert f"error: {where}: cannot be written (Not a directory): choose another directory" in err


def test_a_whole_session(make, shape, tmp_path, capsys):
    root = make.megatron(shape())
    code, out, _ = run(capsys, "inspect", root)
    assert code == 0
    assert "qwen3" in out
    assert "iteration   5" in out
    code, out, _ = run(capsys, "plan", root, tmp_path / "out", "--to", "hf", "--shard-size", "100KB")
    assert code == 0
    assert "model-00001-of-" in out
    assert not (tmp_path / "out").exists()
    code, out, err = run(capsys, "run", root, tmp_path / "out", "--to", "hf")
    assert code == 0
    assert "parameters" in out
    assert "note: tokenizer: none found" in err
    assert run(capsys, "verify", root, tmp_path / "out")[:2] == (
        0,
        "equal: 36 tensors, 374.7 kB, every bit\n",
    )


def test_json_everywhere(make, shape, tmp_path, capsys):
    root = make.megatron(shape())
    for words in (
        ("inspect", root),
        ("plan", root, tmp_path / "out", "--to", "hf"),
        ("run", root, tmp_path / "out", "--to", "hf"),
        ("verify", root, tmp_path / "out"),
        ("families",),
    ):
        code, out, _ = run(capsys, *words, "--json")
        assert code == 0
        assert json.loads(out)


def test_a_mismatch_is_exit_code_4_and_named(make, shape, capsys):
    one, other = make.hf(shape(), "one"), make.megatron(shape(), "other", tensors=None)
    weight = shape().hf_tensors()["model.layers.1.mlp.up_proj.weight"]
    weight[7, 5] += 1
    changed = make.hf(shape(), "changed", model__layers__1__mlp__up_proj__weight=weight)
    assert run(capsys, "verify", one, other)[0] == 0
    code, out, _ = run(capsys, "verify", changed, other)
    assert code == 4
    assert "model.layers.1.mlp.up_proj.weight: first differs at element [7, 5]" in out


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("inspect", "nowhere"), 3, "does not exist"),
        (("run", "nowhere", "out", "--to", "hf"), 3, "does not exist"),
        (("run", "nowhere", "out"), 2, "--to"),
        (("run", "a", "b", "--to", "gguf"), 2, "gguf"),
        (("run", "a", "b", "--to", "hf", "--shard-size", "5 apples"), 2, "5GB"),
        (("run", "a", "b", "--to", "hf", "--workers", "0"), 2, "at least 1"),
        ((), 2, "VERB"),
    ],
)
def test_users_mistakes(capsys, tmp_path, monkeypatch, words, code, text):
    monkeypatch.chdir(tmp_path)
    given, out, err = run(capsys, *words)
    assert given == code
    assert text in err
    assert "Traceback" not in out + err


def test_problems_are_listed_by_plan(make, shape, tmp_path, capsys):
    root = make.megatron(shape(), args={"num_layers": 4})
    code, out, err = run(capsys, "plan", root, tmp_path / "out", "--to", "hf", "--json")
    assert code == 2
    assert len(json.loads(out)["problems"]) == 8
    assert "`decoder.layers.3.mlp.linear_fc2.weight` is missing" in err


def test_help_is_quick(python):
    code = "import sys; from flagscale_convert.cli import main; sys.exit(main(['--help']))"
    empty = min(elapsed(python, "import argparse") for _ in range(3))
    helped = min(elapsed(python, code) for _ in range(5))
    assert helped - empty < 0.6


def elapsed(python, code):
    started = time.monotonic()
    assert python(code).returncode == 0
    return time.monotonic() - started


def test_help_imports_nothing_heavy(python):
    done = python(
        "import sys; from flagscale_convert.cli import main; main(['--help']);"
        "print([name for name in ('torch', 'numpy', 'rich') if name in sys.modules], file=sys.stderr)"
    )
    assert done.stderr.strip() == "[]"


def test_neither_torch_nor_megatron_is_needed(make, shape, tmp_path, python):
    done = python(
        "import sys; from flagscale_convert import make_plan, convert, verify\n"
        "convert(make_plan(sys.argv[1], sys.argv[2], to='hf'))\n"
        "convert(make_plan(sys.argv[2], sys.argv[3], to='torch_dist'))\n"
        "assert verify(sys.argv[1], sys.argv[3]).is_equal\n"
        "print([name for name in ('torch', 'megatron', 'safetensors') if name in sys.modules])",
        make.megatron(shape()),
        tmp_path / "hf",
        tmp_path / "mc",
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_ctrl_c_is_130(make, shape, tmp_path):
    code = (
        "import os, sys, time\n"
        "from flagscale_convert import execution, cli\n"
        "write = execution._write_item\n"
        "def slow(*given):\n"
        "    os.write(1, b'writing\\n'); time.sleep(0.2); write(*given)\n"
        "execution._write_item = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    import os

    child = subprocess.Popen(
        [sys.executable, "-c", code, "run", str(make.megatron(shape())), str(tmp_path / "out"), "--to", "hf"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "run the same command again" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "config.json").exists()


def test_reshard_and_the_ways_to_compare(make, shape, tmp_path, capsys):
    root, ranks, dist = make.megatron(shape(layers=4)), str(tmp_path / "ranks"), str(tmp_path / "dist")
    sizes = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    assert main(["reshard", str(root), ranks, "--to", "torch", *sizes]) == 0
    assert main(["reshard", ranks, dist, "--megatron-version", "0.16"]) == 0
    assert (tmp_path / "dist" / "release" / "common.pt").exists()
    capsys.readouterr()
    assert main(["verify", str(root), dist]) == 0
    assert capsys.readouterr().out.endswith("every bit\n")
    assert main(["verify", ranks, dist, "--mode", "cover"]) == 0
    assert capsys.readouterr().out == "equal: 47 tensors, names, types and shapes\n"
    assert main(["inspect", ranks, "--hashes", "--values"]) == 0
    found = capsys.readouterr().out
    assert "format      torch (TP 2, PP 2)" in found
    assert "suspicious" not in found


def test_reshard_needs_a_megatron_checkpoint(make, shape, tmp_path, capsys):
    assert main(["reshard", str(make.hf(shape())), str(tmp_path / "out")]) == 2
    assert "is a Hugging Face model, which has no ranks: use run --to torch_dist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_progress_as_events(make, shape, tmp_path, capsys):
    assert main(["run", str(make.hf(shape())), str(tmp_path / "out"), "--to", "torch_dist", "--json"]) == 0
    captured = capsys.readouterr()
    last = json.loads(captured.err.splitlines()[-1])
    assert last["event"] == "progress"
    assert last["done_bytes"] == last["total_bytes"] > 0
    assert json.loads(captured.out)["missing"] == []
