"""The manifest beside every output: zip's own checksum, every kind of damage found, nothing read twice."""

from __future__ import annotations

import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale_convert import ParallelLayout, SourceDamaged, convert, inspect, make_plan, verify
from flagscale_convert.manifest import MANIFEST, Checksum


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_parts_combine_to_the_checksum_of_the_whole(parts):
    total = Checksum()
    for part in parts:
        total += Checksum.of(part)
    whole = b"".join(parts)
    assert total == Checksum(len(whole), zlib.crc32(whole))


@pytest.mark.parametrize("to", ["hf", "torch_dist", "torch"])
def test_every_file_is_listed_as_it_is(make, shape, tmp_path, to):
    out = tmp_path / "out"
    parallel = ParallelLayout(tensor_model_parallel_size=2) if to == "torch" else None
    convert(make_plan(make.hf(shape()), out, to=to, shard_bytes=150_000, parallel=parallel))
    listed = json.loads((out / MANIFEST).read_bytes())["files"]
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    del files[MANIFEST]
    assert sorted(files) == sorted(listed)
    for name, path in files.items():
        data = path.read_bytes()
        assert listed[name] == {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    assert not inspect(out, hashes=True).suspicions


def test_damage_is_named(make, shape, tmp_path):
    out = tmp_path / "out"
    convert(make_plan(make.megatron(shape()), out, to="hf"))
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    (out / "generation_config.json").unlink()
    found = inspect(out, hashes=True).suspicions
    assert any(text.startswith("model.safetensors: its checksum is") for text in found)
    assert "generation_config.json: is in the manifest and missing" in found
    # Without reading the files, only what their sizes tell is seen; reading the weights reads the files.
    assert inspect(out).suspicions == ("generation_config.json: is in the manifest and missing",)
    assert inspect(out, values=True).suspicions == found


@pytest.mark.parametrize("to", ["hf", "torch_dist", "torch"])
def test_verify_tells_which_file_is_damaged(make, shape, tmp_path, to):
    source, out = make.hf(shape()), tmp_path / "out"
    convert(make_plan(source, out, to=to))
    assert verify(source, out).is_equal
    path = max(out.rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    name = str(path.relative_to(out))
    found = [str(difference) for difference in verify(source, out).differences]
    assert any(text.startswith(f"{out}: {name}: its checksum is") for text in found)
    assert any("first differs at element" in text for text in found)


def test_training_on_in_the_same_directory_is_no_damage(make, shape, tmp_path):
    out = tmp_path / "out"
    convert(make_plan(make.hf(shape()), out, to="torch_dist"))
    (out / "release").rename(out / "iter_0000012")
    (out / "latest_checkpointed_iteration.txt").write_text("12")
    assert not inspect(out, values=True).suspicions


def test_a_checkpoint_without_a_manifest_says_so(make, shape):
    with pytest.raises(SourceDamaged, match="only checkpoints this tool wrote"):
        inspect(make.hf(shape()), hashes=True)
