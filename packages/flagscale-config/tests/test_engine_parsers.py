"""The tables hold every option of the real parsers, and what is rendered reads back to what it was.

SGLang's is asked by hand only: `FLAGSCALE_TEST_SGLANG_PYTHON=ENV/bin/python pytest -m sglang`, with an
environment that can import `sglang.srt.server_args`; no accelerator is needed.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale_config import check, load, option_table, recipes, render, render_engine, render_megatron
from flagscale_config.options import known_versions
from flagscale_config.translation import effective_options

ENGINES = [
    pytest.param("megatron", marks=pytest.mark.megatron),
    pytest.param("vllm", marks=pytest.mark.vllm),
    pytest.param("sglang", marks=pytest.mark.sglang),
]
DISTRIBUTION = {"megatron": "megatron-core", "vllm": "vllm", "sglang": "sglang"}
OF_THE_MACHINE = {"mm_processor_device"}
"""Options whose choices depend on the devices that the parser finds."""


class Parser:
    """An engine's own parser in a process of its own."""

    def __init__(self, engine):
        self.engine = engine
        python = os.environ.get(f"FLAGSCALE_TEST_{engine.upper()}_PYTHON", sys.executable)
        argv = [python, str(Path(__file__).with_name("engine_parser.py")), engine]
        ask = f"import importlib.metadata as m; print(m.version({DISTRIBUTION[engine]!r}))"
        self.version = subprocess.run(
            [python, "-c", ask], capture_output=True, text=True, check=True
        ).stdout.strip()
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.actions = json.loads(self.process.stdout.readline())

    def parse(self, words):
        self.process.stdin.write(json.dumps(list(words)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def parsers():
    running = {}

    def get(engine):
        if engine not in running:
            running[engine] = Parser(engine)
        return running[engine]

    yield get
    for parser in running.values():
        parser.close()


def positive(action):
    """Return the flags that are not the `--no-x` of an `--x` beside them."""
    return [f for f in action["flags"] if not (f.startswith("--no-") and f"--{f[5:]}" in action["flags"])]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_option_of_the_real_parser_is_in_the_table(engine, parsers, covered):
    parser = parsers(engine)
    table = option_table(engine, parser.version)
    wanted = [action for action in parser.actions if action["dest"] != "help"]
    known = [action for action in wanted if all(flag[2:] in table for flag in positive(action))]
    covered.append(f"{engine} {parser.version}: {len(known)} of {len(wanted)} options")
    assert [action["flags"] for action in wanted if action not in known] == []
    if parser.version.partition("+")[0] in known_versions(engine):
        assert sum(not option.is_added for option in table.options.values()) == len(wanted)
    for action in wanted:
        option, is_opposite = table.find(positive(action)[0][2:])
        assert not is_opposite
        assert option.attribute == action["dest"]
        assert (option.kind in {"list"}) == (action["nargs"] not in (None, 0, "?"))
        if option.name not in OF_THE_MACHINE:
            choices = {choice for choice in action["choices"] or () if choice != "None"}
            assert {str(choice) for choice in option.choices} == choices


TEXT = st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1, max_size=12).filter(
    lambda text: text not in {"None", "[]", "{}"}
)


PATTERN = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=5).map(tuple)


def integers(bounds):
    """Return the whole numbers of a range."""
    low = bounds.get("ge", bounds.get("gt", -(2**31) - 1) + 1)
    return st.integers(low, bounds.get("le", bounds.get("lt", 2**31 + 1) - 1))


def floats(bounds):
    """Return the numbers of a range."""
    low, high = bounds.get("ge", bounds.get("gt", -1e9)), bounds.get("le", bounds.get("lt", 1e9))
    return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds)


def written_value_of(option):
    """Return a strategy of values that the engine takes apart; None where only it knows its grammar."""
    if option.type == "tuple":
        return st.lists(st.integers(0, 9), min_size=2, max_size=2).map(tuple)
    is_pattern = option.type == "expr" and option.kind == "value" and not option.choices
    return PATTERN if is_pattern else None


def value_of(option):
    """Return a strategy of values that the engine keeps as they are; None for those it computes with."""
    if option.is_switch:
        return st.booleans()
    if option.kind == "json" or option.type in {"expr", "bool", "tuple"}:
        return written_value_of(option)
    one = {"int": integers(option.bounds), "size": st.integers(1, 2**31), "float": floats(option.bounds)}
    single = st.sampled_from(option.choices) if option.choices else one.get(option.type, TEXT)
    if option.kind in {"list", "append"}:
        safe = single.filter(lambda item: not str(item).startswith("-"))
        count = option.nargs if isinstance(option.nargs, int) else None
        return st.lists(safe, min_size=count or 1, max_size=count or 3).map(tuple)
    return single


UNDERSTOOD = {
    "vllm": {"config", "lora_modules", "device_ids"},
    "megatron": set(),
    "sglang": {"monokernel_backend"},
}
"""Options that the parser acts on at once (it opens the file), or takes apart by a grammar of its own."""


@pytest.mark.parametrize("engine", ENGINES)
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_rendered_options_read_back_by_the_real_parser(engine, parsers, data):
    parser = parsers(engine)
    table = option_table(engine, parser.version)
    plain = [
        option
        for option in table.options.values()
        if value_of(option) is not None
        and not option.is_added
        and option.name not in UNDERSTOOD[engine] | OF_THE_MACHINE
    ]
    chosen = data.draw(
        st.lists(st.sampled_from(plain), max_size=8, unique_by=lambda item: item.attribute), label="options"
    )
    options = {item.name: data.draw(value_of(item)) for item in chosen}
    back = parser.parse(render_engine(engine, options, version=parser.version))
    assert "refused" not in back, back["refused"]
    for item in chosen:
        given_, found = options[item.name], back[item.attribute]
        if item.kind == "false":
            assert found is (not given_)
        elif item.kind in {"list", "append"} or isinstance(given_, tuple):
            assert tuple(found) == given_
        elif item.kind == "true" and not given_ and table.twin(item) is None:
            assert not found
        else:
            assert found == given_


def offered(task):
    """Return the installed recipes whose experiment is of this task."""
    return sorted(
        name for name, path in recipes(task).items() if (path.parent / task).is_dir() and ":" not in name
    )


def loaded(task, name, engine, parser):
    """Load a recipe with something in every place that is left to the user."""
    path, versions = recipes(task)[name], {engine: parser.version}
    asked = [p.key for p in check(path, versions=versions) if "required from the user" in p.message]
    return load(path, [f"{key}=/given" for key in asked], versions=versions)


def reads_back(words, options, parser, table):
    """Compare what the real parser makes of words with the options that they say."""
    back = parser.parse(words)
    assert "refused" not in back, back["refused"]
    for key, value in options.items():
        option = table.options[key]
        if option.type not in {"expr", "bool", "tuple"} and option.kind not in {"false", "true", "json"}:
            assert back[option.attribute] == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.megatron
@pytest.mark.parametrize("name", offered("train"))
def test_rendered_recipes_read_back_by_megatron(name, parsers):
    parser = parsers("megatron")
    experiment = loaded("train", name, "megatron", parser)
    table = option_table("megatron", parser.version)
    # Options that flagscale-train adds to the parser are read back by its own tests.
    options = {
        key: value for key, value in experiment.train.options.items() if not table.options[key].is_added
    }
    reads_back(render_megatron(options, version=parser.version), options, parser, table)


@pytest.mark.vllm
@pytest.mark.parametrize("name", offered("serve"))
def test_rendered_recipes_read_back_by_vllm(name, parsers):
    parser = parsers("vllm")
    experiment = loaded("serve", name, "vllm", parser)
    for instance in experiment.serve:
        if instance.engine in {"vllm", None}:
            options = effective_options(
                "vllm",
                instance.engine_args,
                instance.engine_args_specific.get("vllm", {}),
                version=parser.version,
            ).options
            words = render(experiment, instance.serve_id, version=parser.version)
            given = {key: value for key, value in options.items() if key != "model"}
            reads_back(words, given, parser, option_table("vllm", parser.version))


def test_the_version_of_the_table_is_that_of_the_installed_engine():
    for engine, distribution in (("megatron", "megatron-core"), ("vllm", "vllm"), ("sglang", "sglang")):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        assert option_table(engine).version == option_table(engine, version).version
