"""Which model directories are whole."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale_serve import InvalidModel, read_model


def test_a_whole_directory(model_dir):
    model = read_model(model_dir)
    assert model.architecture == "Qwen3ForCausalLM"
    assert model.has_chat_template
    assert model.head_dim == 32
    assert model.num_weight_bytes == (model_dir / "model.safetensors").stat().st_size


def test_head_dim_from_the_other_two_numbers(model_dir):
    config = {"architectures": ["X"], "hidden_size": 96, "num_attention_heads": 4}
    (model_dir / "config.json").write_text(json.dumps(config))
    assert read_model(model_dir).head_dim == 24


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json: not a JSON object"),
        (lambda d: (d / "config.json").write_text("{}"), "architectures: None"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "config.json: not valid JSON"),
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer: one of tokenizer.json"),
        (lambda d: (d / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: not valid JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "no weights"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "0 bytes: cut short"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"version https://git-lfs"),
            "cut short, or not a safe",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"[]"), "header is damaged"),
    ],
)
def test_a_spoiled_directory_is_refused_with_its_cure(model_dir, spoil, message):
    spoil(model_dir)
    with pytest.raises(InvalidModel) as caught:
        read_model(model_dir)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_directory_tells_how_to_fetch_it(tmp_path):
    with pytest.raises(InvalidModel, match=r"no such directory.*hf download Qwen/Qwen3-0.6B"):
        read_model(tmp_path / "Qwen" / "Qwen3-0.6B")
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(InvalidModel, match="a file: the directory of a model is needed"):
        read_model(file)


def write_index(model_dir, weight_map):
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_names_what_is_missing(model_dir, safetensors):
    write_index(model_dir, {"a": "model-1.safetensors", "c": "model-2.safetensors"})
    safetensors(model_dir / "model-1.safetensors", ("a",))
    with pytest.raises(InvalidModel, match=r"1 of 2 weight files are missing \(model-2.safetensors\)"):
        read_model(model_dir)
    safetensors(model_dir / "model-2.safetensors", ("b",))
    with pytest.raises(InvalidModel, match=r"1 tensors are not in the files that should hold them \(c\)"):
        read_model(model_dir)
    safetensors(model_dir / "model-2.safetensors", ("b", "c"))
    assert read_model(model_dir).num_weight_bytes > 0
    write_index(model_dir, {})
    with pytest.raises(InvalidModel, match="weight_map: missing or empty"):
        read_model(model_dir)


def test_made_up_weights_need_no_file_and_a_tokenizer_may_lie_elsewhere(model_dir, tmp_path):
    (model_dir / "model.safetensors").unlink()
    elsewhere = tmp_path / "words"
    elsewhere.mkdir()
    (model_dir / "tokenizer.json").rename(elsewhere / "tokenizer.json")
    model = read_model(model_dir, tokenizer=elsewhere, with_weights=False)
    assert model.num_weight_bytes == 0
    assert not model.has_chat_template


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(keep=st.integers(0, 10_000))
def test_every_cut_of_a_weight_file_is_found(model_dir, safetensors, keep):
    path = model_dir / "model.safetensors"
    safetensors(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep % len(whole)])
    with pytest.raises(InvalidModel):
        read_model(model_dir)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_damaged_weight_file_never_raises_anything_else(model_dir, safetensors, place, value):
    path = model_dir / "model.safetensors"
    safetensors(path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(data)
    with suppress(InvalidModel):
        read_model(model_dir)
