"""Broken bytes: every fault has its line, none a traceback, none hides another."""

import time

import pytest

from flagscale_config import ConfigError, check, load
from flagscale_config.document import MAX_BYTES


def complaints(source: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """Return the errors as lines."""
    return [str(problem) for problem in check(source, overrides) if problem.severity == "error"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1\nb: 2\n", "e.yaml:2:2: YAML syntax: expected ',' or ']', but got ':'"),
        ("a: 1\n\tb: 2\n", "e.yaml:2:1: YAML syntax: found character '\\t' that cannot start any token"),
        ("a: 'x\n", "e.yaml:2:1: YAML syntax: found unexpected end of stream"),
        ("a: *nothing\n", "e.yaml:1:4: YAML syntax: found undefined alias 'nothing'"),
        (
            "a: !!python/object/apply:os.system ['true']\n",
            "e.yaml:1:4: YAML syntax: could not determine a constr",
        ),
        ("a: !Foo 1\n", "e.yaml:1:4: YAML syntax: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "e.yaml:2:1: YAML syntax: but found another document"),
        ("{a: 1}: 2\n", "e.yaml:1:1: a key must be text, not a list or a mapping"),
        (b"a: \xff\n", "e.yaml:1:4: byte 0xff is not UTF-8; save the file as UTF-8"),
        (b"ok: 1\nb: \x00\n", "e.yaml:2:4: control character U+0000 is not allowed in YAML; remove it"),
        ("- 1\n- 2\n", "e.yaml:1:1: the file must hold `key: value` pairs"),
        ("just text\n", "e.yaml:1:1: the file must hold `key: value` pairs"),
        ("", "e.yaml:1:1: experiment is required: a mapping with exp_name, exp_dir and task"),
        ("a: &a [*a]\n", "e.yaml:1:4: nested more than 60 levels deep"),
        ("a: " + "[" * 200 + "]" * 200, "e.yaml:1:64: nested more than 60 levels deep"),
        ("a: " + "[" * 5000, "e.yaml: nested more than 60 levels deep"),
        ("a: " + "9" * 10000, "e.yaml"),
        (
            "<<: 1\n",
            "e.yaml:1:5: YAML syntax: expected a mapping or list of mappings for merging, but found scalar",
        ),
    ],
)
def test_broken_files_are_located(content, expected, project):
    project({"e.yaml": content})
    first = complaints("e.yaml")[0]
    assert first.startswith(expected)
    assert "\n" not in first


def test_duplicate_keys_are_all_reported_beside_other_faults(project):
    project(
        {
            "e.yaml": """
                experiment:
                  exp_name: a
                  exp_name: b
                  task: {type: serve}
                  runer: {}
                serve:
                  - serve_id: m
                    engine_args: {model: x, model: y}
                """
        }
    )
    assert complaints("e.yaml") == [
        "e.yaml:3:3: experiment.exp_name: duplicate key; first given at line 2; keep one",
        "e.yaml:5:3: experiment.runer: unknown key; did you mean runner?",
        "e.yaml:8:29: serve.0.engine_args.model: duplicate key; first given at line 8; keep one",
    ]


def test_alias_bombs_are_refused_quickly(project):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    project({"e.yaml": "\n".join(lines)})
    start = time.monotonic()
    (first,) = complaints("e.yaml")
    assert "more than 100000 values, aliases expanded" in first
    assert time.monotonic() - start < 20


def test_interpolation_bombs_are_refused_quickly(project):
    lines = ["experiment: {exp_name: a, task: {type: serve}}", "b0: [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 12):
        again = f'"${{b{level - 1}}}"'
        lines.append(f"b{level}: [{', '.join([again] * 9)}]")
    project({"e.yaml": "\n".join(lines)})
    start = time.monotonic()
    assert any("interpolations expand to too many" in line for line in complaints("e.yaml"))
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("written", "read", "said"),
    [
        ("yes", "true", "true"),
        ("NO", "false", "false"),
        ("On", "true", "true"),
        ("off", "false", "false"),
        ("0123", "83", None),
        ("-010", "-8", None),
        ("22:30", "1350", None),
        ("1:30:00.5", "5400.5", None),
    ],
)
def test_what_yaml_reads_otherwise_is_noted(written, read, said, project):
    head = "experiment: {exp_name: a, task: {type: serve}}"
    project({"e.yaml": f"{head}\nx:\n  y: {written}\n  z: ['', {written}]\n"})
    notes = [problem for problem in check("e.yaml") if problem.severity == "note"]
    message = f"YAML reads {written} as {read}; write {read}, or quote it if it is text"
    assert [str(note) for note in notes] == [f"e.yaml:3:3: x.y: {message}", f"e.yaml:4:11: x.z.1: {message}"]
    assert {(note.code, note.suggestion) for note in notes} == {("config/misread", said)}


@pytest.mark.parametrize(
    "written",
    [
        "true",
        "'yes'",
        '"22:30"',
        "0",
        "00",
        "007",
        "1_000",
        "0x1f",
        "1e-5",
        "08",
        "y",
        "12:99",
        "2024-01-01",
        ".5",
        "~",
    ],
)
def test_what_yaml_reads_as_it_looks_is_not(written, project):
    project({"e.yaml": f"experiment: {{exp_name: a, task: {{type: serve}}}}\nx: {written}\n"})
    assert [problem for problem in check("e.yaml") if problem.code == "config/misread"] == []


def test_a_key_that_yaml_reads_otherwise_is_noted(project):
    project({"e.yaml": "on: {1: a}\n'off': 1\n"})
    (note,) = [problem for problem in check("e.yaml") if problem.code == "config/misread"]
    assert str(note) == "e.yaml:1:1: on: YAML reads the key on as true; write true, or quote it if it is text"


def test_huge_files_are_not_read(project):
    project({"e.yaml": b"a: 1\n" + b"#" * MAX_BYTES})
    (first,) = complaints("e.yaml")
    assert first == "e.yaml: the file is larger than 1 MiB; this is not a configuration"


@pytest.mark.parametrize("prefix", [b"\xef\xbb\xbf", b"# text\r\n"])
def test_byte_order_marks_and_windows_lines_are_fine(prefix, project):
    body = b"experiment: {exp_name: a, task: {type: serve}}\r\nserve:\r\n- {serve_id: m}\r\n"
    project({"e.yaml": prefix + body})
    assert load("e.yaml").name == "a"


def test_missing_files_say_what_there_is(project):
    project(
        {
            "conf/a.yaml": "defaults: [_self_, {train: tinny}, {serve: one}]\n",
            "conf/train/tiny.yaml": "",
            "conf/serve/two.yaml": "",
        }
    )
    assert complaints("conf/a.yaml") == [
        "conf/a.yaml:1:20: defaults: no such file: conf/train/tinny.yaml; did you mean tiny?",
        "conf/a.yaml:1:36: defaults: no such file: conf/serve/one.yaml; available: two",
    ]
    assert complaints("conf/nothing.yaml") == ["conf/nothing.yaml: no such file; check the path"]
    assert complaints("conf") == ["conf: is a directory; name an experiment file in it"]


def test_a_file_may_be_named_without_its_suffix(tiny):
    assert load("conf/tiny").source == load(tiny).source


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: ${b}\nb: ${a}\n", "a: cannot resolve '${b}': it refers to itself"),
        ("a: {x: '${a}'}\n", "a.x: cannot resolve '${a}': it refers to itself"),
        ("a: ${nothing.here}\n", "a: cannot resolve '${nothing.here}': 'nothing.here' not found"),
        ("a: ${oc.env:FLAGSCALE_SURELY_UNSET}\n", "variable FLAGSCALE_SURELY_UNSET is not set; set it"),
        ("a: ${made.up:1}\n", "a: cannot resolve '${made.up:1}': Unsupported interpolation type made.up"),
        ("a: ${env:FLAGSCALE_SURELY_UNSET}\n", "variable FLAGSCALE_SURELY_UNSET is not set; set it"),
        ("a: ${b\n", "a: '${b' is not an interpolation: "),
    ],
)
def test_interpolations_that_fail_are_located(content, expected, project):
    project({"e.yaml": content})
    found = complaints("e.yaml")
    assert any(line.startswith("e.yaml:1:") and expected in line for line in found)


@pytest.mark.parametrize("text", ["???", "${data_path:??}", "${data_path ???}", "${ x :???}", "'${a.b:??}'"])
def test_values_required_from_the_user_are_listed(text, edited):
    source = edited("conf/train/tiny.yaml", "data_path: corpus", f"data_path: {text}")
    (line,) = complaints(source)
    assert line == (
        "conf/train/tiny.yaml:16:3: train.data.data_path: required from the user: set it in the file or pass "
        "train.data.data_path=..."
    )
    assert load(source, ["train.data.data_path=/d"]).train.options["data_path"] == ("/d",)


def test_errors_survive_pickling(project):
    import pickle

    with pytest.raises(ConfigError) as caught:
        load("nothing.yaml")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.problems == caught.value.problems
    assert copy.exit_code == 2


def test_control_characters_in_keys_do_not_break_lines(project):
    head = "experiment:\n  exp_name: a\n  task: {type: serve}\n"
    project({"e.yaml": (head + '  "x\\ny\\e[31m": 1\nserve: [{serve_id: m}]\n').encode()})
    (line,) = complaints("e.yaml")
    assert line == "e.yaml:4:3: experiment.x\\ny\\x1b[31m: unknown key"
