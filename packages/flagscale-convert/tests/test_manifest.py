"""The manifest beside every output: zip's own checksum, every kind of damage found, nothing read twice."""

from __future__ import annotations

import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale_convert import ParallelLayout, SourceDamaged, convert, inspect, make_plan
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
    assert not inspect(out).suspicions


def test_a_checkpoint_without_a_manifest_says_so(make, shape):
    with pytest.raises(SourceDamaged, match="only checkpoints this tool wrote"):
        inspect(make.hf(shape()), hashes=True)
