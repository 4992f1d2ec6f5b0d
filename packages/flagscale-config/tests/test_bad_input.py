"""Nothing that can be put where a configuration belongs brings a traceback, a hang, or code to run."""

import os
import socket
from pathlib import Path

import pytest

from flagscale_config import check
from flagscale_config.cli import main
from flagscale_config.document import MAX_BYTES

HEAD = "experiment: {exp_name: a, task: {type: serve}}\nserve: [{serve_id: m, engine_args: {model: x}}]\n"
SMALL = b"""defaults: [_self_]
experiment:
  exp_name: &n 'a b'
  task: {type: serve}
  envs: {A: "${experiment.exp_name}\\t", B: *n}
serve:
- serve_id: m
  engine_args: {model: x, max_model_len: 1e3}
"""


def refused(capsys):
    """Check the file by the command, which must refuse it without a traceback."""
    assert main(["check", "e.yaml"]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.err.startswith("error: e.yaml")
    assert said.out == ""


def errors(source="e.yaml", overrides=()):
    """Return the errors as lines; each is one line that a terminal may print, with a place."""
    problems = check(source, overrides)
    for problem in problems:
        assert str(problem).isprintable()
        assert len(str(problem)) < 6000
        assert problem.origin is not None
    return [str(problem) for problem in problems if problem.severity == "error"]


def test_the_file_that_is_corrupted_is_sound(project):
    project({"e.yaml": SMALL})
    assert errors() == []


def test_a_file_cut_at_any_byte(project):
    for cut in range(len(SMALL)):
        project({"e.yaml": SMALL[:cut]})
        errors()


@pytest.mark.parametrize("bit", [0, 5])
def test_a_file_with_any_bit_flipped(bit, project):
    for at in range(len(SMALL)):
        project({"e.yaml": SMALL[:at] + bytes([SMALL[at] ^ 1 << bit]) + SMALL[at + 1 :]})
        errors()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (HEAD.encode("utf-16"), "byte 0xff is not UTF-8"),
        (HEAD.encode("utf-32"), "byte 0xff is not UTF-8"),
        (HEAD.encode("utf-16-le"), "control character U+0000 is not allowed"),
        (HEAD.encode() + b"\0", "control character U+0000 is not allowed"),
        (HEAD.encode() + b"# \xe9\n", "e.yaml:3:3: byte 0xe9 is not UTF-8"),
        (HEAD.encode() + b"\tx: 1\n", "e.yaml:3:1: YAML syntax: found character '\\t'"),
        (b"a: &a\n  <<: *a\n", "nested more than 60 levels deep"),
        (b"a: &a\n  b:\n    <<: *a\n", "nested more than 60 levels deep"),
        (b"a: " + b"{a: " * 3000 + b"1" + b"}" * 3000, "nested more than 60 levels deep"),
        (b"- " * 20000 + b"1\n", "nested more than 60 levels deep"),
        (
            HEAD.encode() + b"x: 0x" + b"f" * 200000,
            "x: a number of 200002 characters; quote it if it is text",
        ),
        (
            HEAD.encode() + b"x: " + b"1:" * 3000 + b"1\n",
            "x: a number of 6001 characters; quote it if it is text",
        ),
        (HEAD.encode() + b"? " + b"k" * 20000 + b"\n: 1\n", "e.yaml:3:3: a key of 20000 characters; 200 are"),
        (HEAD.encode() + b"null: a\n", "e.yaml:3:1: a key must not be null; quote it if it is text"),
        (HEAD.encode() + b"x: !!set {a, b}\n", "e.yaml:3:4: x: a YAML set is not supported; write a list"),
        (HEAD.encode() + b"x: !!bool maybe\n", "a value does not fit its !!tag"),
        (HEAD.encode() + b"x: !!map [1]\n", "a value does not fit its !!tag"),
        (HEAD.encode() + b"x: !!map text\n", "a value does not fit its !!tag"),
        (HEAD.encode() + b"x: !!timestamp 2001-99-99\n", "a value does not fit its !!tag"),
        (
            HEAD.encode() + b"x: ${" + b"a." * 4000 + b"b}\n",
            "text with interpolations may have 4096 characters",
        ),
        (HEAD.encode() + b"x: '" + b"${a}" * 65 + b"'\n", "and 64 interpolations"),
        (HEAD.encode() + b"x: " + b"${" * 200 + b"a" + b"}" * 200, "and 64 interpolations"),
        (HEAD.encode() + b"x: ${oc.select:x}\n", "x: cannot resolve '${oc.select:x}'"),
        (
            HEAD.encode() + b"x: {y: '${x.z}', z: '${x.y}'}\n",
            "x.y: cannot resolve '${x.z}': it refers to itself",
        ),
        (b"defaults: [e]\n", "e.yaml"),
        (b"defaults: {a: b}\n", "e.yaml:1:1: defaults: "),
        (b'defaults: ["a\\0b"]\n', "no such file"),
        (b"defaults: [" + b"x" * 5000 + b"]\n", "no such file"),
    ],
    ids=lambda item: repr(item)[:40],
)
def test_broken_bytes_and_values(raw, expected, project, capsys):
    project({"e.yaml": raw})
    found = errors()
    assert any(expected in line for line in found), found
    refused(capsys)


def test_a_merge_bomb(project, capsys):
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}" for level in range(1, 25)]
    project({"e.yaml": "\n".join(lines)})
    assert "more than 100000 values, aliases expanded" in errors()[0]
    refused(capsys)


def test_a_large_file_is_not_read(project, capsys):
    path = project({"e.yaml": b""})
    with path.open("wb") as stream:
        stream.truncate(100 * 1024 * 1024)
    assert errors() == ["e.yaml: the file is larger than 1 MiB; this is not a configuration"]
    assert MAX_BYTES == 2**20
    refused(capsys)


def test_defaults_that_name_each_other(project):
    project({"e.yaml": "defaults: [f]\n", "f.yaml": "defaults: [g]\n", "g.yaml": "defaults: [f]\n"})
    (line,) = errors()
    assert line.startswith("e.yaml:1:1: defaults: ")


EVIL = "__import__('os').system('touch evil')"


@pytest.mark.parametrize(
    "text",
    [
        '!!python/object/apply:os.system ["touch evil"]',
        "!!python/name:os.system",
        f'!!python/object/new:eval ["{EVIL}"]',
        f'${{oc.decode:"{EVIL}"}}',
        f"${{eval:'{EVIL}'}}",
        f"${{oc.create:'{EVIL}'}}",
        "${hydra:runtime.cwd}",
        f'"([0]*3+{EVIL})"',
    ],
)
def test_no_value_runs_code(text, project, capsys):
    project({"e.yaml": f"{HEAD}x: {text}\ntrain: {{model: {{moe_layer_freq: {text}}}}}\n"})
    assert errors()
    assert main(["check", "e.yaml", f"++y={text}"]) == 2
    assert not Path("evil").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_target_is_only_text(project):
    project({"e.yaml": HEAD + "x: {_target_: os.system, _args_: ['touch evil']}\n"})
    assert errors() == ["e.yaml:3:1: x: unknown key"]
    assert not Path("evil").exists()


@pytest.fixture(params=["pipe", "device", "socket", "directory", "loop", "dangling"])
def not_a_file(request, project):
    """Return the name of something that is there, and is no file."""
    path = project({"conf/a.yaml": HEAD}).parent / "e.yaml"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as server:  # its path stays; a long one would not fit
            os.chdir(path.parent)
            server.bind("e.yaml")
            os.chdir(path.parent.parent)
    elif request.param == "directory":
        path.mkdir()
    else:
        path.symlink_to(path if request.param == "loop" else "nothing")
    return "conf/e.yaml"


def test_what_is_no_file_is_not_opened(not_a_file):
    (line,) = errors(not_a_file)
    assert line.startswith(f"{not_a_file}: ")
    assert main(["check", not_a_file]) == 2


def test_a_default_that_is_no_file_is_not_opened(project):
    path = project({"conf/a.yaml": "defaults: [_self_, {train: x}]\n" + HEAD, "conf/train/y.yaml": ""})
    os.mkfifo(path.parent / "train" / "x.yaml")
    assert any("no such file: conf/train/x.yaml" in line for line in errors("conf/a.yaml"))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_an_unreadable_file(project):
    project({"e.yaml": HEAD}).chmod(0)
    (line,) = errors()
    assert line == "e.yaml: cannot be read: Permission denied"


@pytest.mark.parametrize(
    "name", ["a\nb.yaml", "a\x1b[31m.yaml", "a\u202eb.yaml", "a\0b.yaml", "x" * 5000, "\udcff.yaml"]
)
def test_odd_names_of_files(name, project, capsys):
    project({"e.yaml": HEAD})
    assert len(errors(name)) == 1
    assert main(["check", name]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    [
        "",
        "=",
        "a",
        "~",
        "+",
        "++",
        "a=${",
        "a=[",
        "a=" + "[" * 3000,
        "a=" + "${" * 300,
        "~a=b=c",
        "a=\0",
        "\x1b[31m=1",
        "a." * 3000 + "b=1",
        "experiment=1",
        "~experiment",
        "serve=null",
        "@=1",
        "a@b@c=1",
        "/=/",
        "a[=1",
        "a[99999999]=1",
        "+x=${oc.decode:'[1'}",
        "++serve.0.serve_id={a:${serve}}",
        "+x=int(abc)",
        "+x=shuffle(1,2)",
        "hydra.x=1",
        "\udcff=1",
    ],
    ids=lambda text: repr(text)[:30],
)
def test_odd_overrides(override, project, capsys):
    project({"e.yaml": HEAD})
    errors(overrides=[override])
    assert main(["check", "e.yaml", override]) in {0, 2}
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "\x1b" not in captured.out + captured.err
