"""Options become command lines by the engine's table, and read back to what they were."""

import argparse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale_config import ConfigError, load, option_table, render_engine, render_megatron


def parser_of(engine: str) -> argparse.ArgumentParser:
    """Build a parser from an engine's table, as the engine would."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    types = {"int": int, "float": float}
    for option in option_table(engine).options.values():
        if option.kind in {"true", "false"}:
            parser.add_argument(*option.flags, dest=option.name, action="store_true")
        elif option.kind == "pair":
            parser.add_argument(*option.flags, dest=option.name, action="store_true", default=None)
            parser.add_argument(str(option.negative), dest=option.name, action="store_false", default=None)
        elif option.kind == "append":
            parser.add_argument(*option.flags, dest=option.name, action="append")
        elif option.kind == "optional":
            parser.add_argument(*option.flags, dest=option.name, nargs="?", const=True)
        else:
            kind = types.get(option.type, str)
            nargs = option.nargs if option.kind == "list" else None
            parser.add_argument(*option.flags, dest=option.name, type=kind, nargs=nargs)
    return parser


MEGATRON = option_table("megatron").version
PARSERS = {engine: parser_of(engine) for engine in ("megatron", "vllm", "transformers")}


RANGE = (("ge", "gt"), ("le", "lt"))


def value_of(option):
    """Return a strategy of the values an option takes."""
    if option.is_switch:
        return st.booleans()
    if option.choices:
        one = st.sampled_from(option.choices)
    elif option.type in {"int", "size"}:
        low = option.bounds.get("ge", option.bounds.get("gt", -(2**40) - 1) + 1)
        one = st.integers(low, 2**40)
    elif option.type == "float":
        low, high = (next((b for name, b in option.bounds.items() if name in pair), None) for pair in RANGE)
        strict = {"exclude_min": "gt" in option.bounds, "exclude_max": "lt" in option.bounds}
        one = st.floats(low, high, allow_nan=False, allow_infinity=False, **strict)
    elif option.type in {"expr", "tuple"}:
        one = st.text("[]()0123456789,+*", min_size=1)
    else:
        one = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).filter(
            lambda text: not text.isspace()
        )
    if option.kind == "json":
        keys = st.sampled_from(option.keys) if option.keys else st.text(max_size=5)
        return st.dictionaries(keys, st.integers() | st.lists(st.booleans()), min_size=1)
    if option.kind in {"list", "append"}:
        safe = one.filter(lambda item: not str(item).startswith("-"))
        count = option.nargs if isinstance(option.nargs, int) else None
        return st.lists(safe, min_size=count or 1, max_size=count or 3).map(tuple)
    return one


@pytest.mark.parametrize("engine", PARSERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rendered_options_read_back(engine, data):
    table = option_table(engine)
    chosen = data.draw(
        st.lists(
            st.sampled_from(list(table.options.values())), max_size=6, unique_by=lambda item: item.attribute
        )
    )
    options = {item.name: data.draw(value_of(item)) for item in chosen}
    words = render_megatron(options) if engine == "megatron" else render_engine(engine, options)
    assert all(isinstance(word, str) for word in words)
    back = PARSERS[engine].parse_args(words)
    for item in chosen:
        value, found = options[item.name], getattr(back, item.name)
        if item.kind == "json":
            import json

            assert json.loads(found) == value
        elif item.kind in {"list", "append"}:
            assert tuple(found) == tuple(value)
        elif item.kind in {"true", "false"}:
            twin = table.twin(item)
            assert found == (value if twin is None or value else False)
        elif item.type in {"expr", "size", "bool", "str"}:
            assert str(found) == str(value)
        else:
            assert found == value


def test_megatron_words_are_exact():
    words = render_megatron(
        {
            "num_layers": 2,
            "bf16": True,
            "fp16": False,
            "no_rope_fusion": True,
            "no_masked_softmax_fusion": False,
            "rl_partial_rollouts": False,
            "yarn_correction_range_round_to_int": False,
            "lr": 1e-5,
            "min_lr": 0.1 + 0.2,
            "data_path": ("a b", "c"),
            "exit_duration_in_mins": -5,
            "load": None,
            "moe_layer_freq": "[0]+[1]*3",
        }
    )
    assert words == (
        "--bf16",
        "--data-path",
        "a b",
        "c",
        "--exit-duration-in-mins=-5",
        "--lr",
        "1e-05",
        "--min-lr",
        "0.30000000000000004",
        "--moe-layer-freq",
        "[0]+[1]*3",
        "--no-rope-fusion",
        "--num-layers",
        "2",
        "--no-rl-partial-rollouts",
        "--no-yarn-correction-range-round-to-int",
    )


def test_vllm_words_are_exact():
    words = render_engine(
        "vllm",
        {
            "model": "/m",
            "tensor_parallel_size": 2,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_model_len": "32k",
            "served_model_name": ("a", "b"),
            "limit_mm_per_prompt": {"image": 8},
            "middleware": ("x.y",),
            "hf_token": True,
            "allowed_origins": ("*",),
        },
    )
    assert words == (
        "--allowed-origins",
        '["*"]',
        "--no-enable-prefix-caching",
        "--enforce-eager",
        "--hf-token",
        "--limit-mm-per-prompt",
        '{"image":8}',
        "--max-model-len",
        "32k",
        "--middleware=x.y",
        "--model",
        "/m",
        "--served-model-name",
        "a",
        "b",
        "--tensor-parallel-size",
        "2",
    )


def test_transformers_words_are_exact():
    options = {"host": "127.0.0.1", "port": 8001, "device": "cpu", "trust_remote_code": False}
    assert render_engine("transformers", options) == (
        "--device",
        "cpu",
        "--host",
        "127.0.0.1",
        "--port",
        "8001",
        "--no-trust-remote-code",
    )


def test_the_order_of_options_does_not_matter(tiny):
    options = dict(load(tiny).train.options)
    backwards = dict(reversed(options.items()))
    assert render_megatron(options) == render_megatron(backwards)


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("megatron", {"num_layer": 2}, f"unknown option of megatron {MEGATRON}; did you mean num_layers?"),
        ("vllm", {"tensor_parallel_size": "x"}, "must be an integer ('x' given)"),
        ("vllm", {"served_model_name": ("a", "-b")}, "'-b' starts with a dash"),
        (
            "tgi",
            {},
            "no option table for engine 'tgi'; known: llama_cpp, megatron, sglang, transformers, vllm",
        ),
    ],
)
def test_what_cannot_be_rendered_is_explained(engine, options, message):
    with pytest.raises(
        ConfigError, match=message.replace("(", "\\(").replace(")", "\\)").replace("?", "\\?")
    ):
        render_engine(engine, options)


@pytest.mark.parametrize("engine", ["megatron", "vllm", "transformers"])
def test_tables_are_whole(engine):
    table = option_table(engine)
    assert len(table.options) > {"megatron": 800, "vllm": 250, "transformers": 20}[engine]
    for option in table.options.values():
        assert option.kind in {"true", "false", "pair", "value", "list", "json", "append", "optional"}
        assert option.type in {"str", "int", "float", "bool", "expr", "size", "tuple"}
        assert all(flag.startswith("--") for flag in option.flags)
        assert (option.negative is not None) == (option.kind == "pair")
        assert table.find(option.name) == (option, False)
    helped = [option for option in table.options.values() if option.help]
    assert len(helped) > 0.9 * len(table.options)


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("moe_layer_freq", [1, 0, 1], "[1,0,1]"),
        ("moe_layer_freq", "([0] * 1 + [1] * 2)", "([0]*1+[1]*2)"),
        ("moe_layer_freq", 2, "2"),
        ("window_size", [128, 0], "(128,0)"),
        ("window_size", "(128, 0)", "(128,0)"),
    ],
)
def test_expressions_have_no_blanks_which_megatron_refuses(option, value, word):
    assert render_megatron({option: value})[1] == word
