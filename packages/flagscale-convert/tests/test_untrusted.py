"""Hostile and broken pickles: named, refused, never executed."""

from __future__ import annotations

import io
import os
import pickle

import pytest
import torch

from flagscale_convert import SourceDamaged, UnsafePickle, convert, inspect, make_plan, unpickle


class Payload:
    """Runs a command when unpickled by anything that executes pickles."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)  # noqa: TID251 - the attack itself


@pytest.fixture
def witness(tmp_path):
    path = tmp_path / "executed"
    # The payload must be a real one, or its refusal proves nothing.
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists()


def test_payload_in_the_metadata(make, shape, witness):
    root = make.megatron(shape())
    path = root / "iter_0000005" / ".metadata"
    path.write_bytes(pickle.dumps([pickle.loads(path.read_bytes()), Payload(witness)]))
    with pytest.raises(UnsafePickle, match=r"\.metadata: the pickle asks for `posix.system`"):
        inspect(root)


def test_payload_in_the_common_state(make, shape, witness):
    root = make.megatron(shape(), common={"args": Payload(witness), "iteration": 5})
    with pytest.raises(UnsafePickle, match=r"common_state.* asks for `posix.system`"):
        inspect(root)


def test_payload_in_common_pt(make, shape, witness):
    root = make.megatron(shape())
    torch.save({"args": Payload(witness)}, root / "iter_0000005" / "common.pt")
    with pytest.raises(UnsafePickle, match=r"common.pt: .* asks for `posix.system`"):
        inspect(root)


def test_payload_in_a_data_file(make, shape, witness, tmp_path):
    root = make.megatron(shape())
    metadata = pickle.loads((root / "iter_0000005" / ".metadata").read_bytes())
    buffer = io.BytesIO()
    torch.save(Payload(witness), buffer)
    hostile = root / "iter_0000005" / "__9_9.distcp"
    hostile.write_bytes(buffer.getvalue())
    for index, info in metadata.storage_data.items():
        if index.fqn == "decoder.final_layernorm.weight":
            info.relative_path, info.offset, info.length = hostile.name, 0, len(buffer.getvalue())
    (root / "iter_0000005" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        UnsafePickle, match=r"__9_9.distcp: decoder.final_layernorm.weight: .* `posix.system`"
    ):
        convert(make_plan(root, tmp_path / "out", to="hf"))


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "subprocess.Popen",
        "importlib.import_module",
        "_io.open",
        "shutil.rmtree",
    ],
)
def test_dangerous_names_are_refused(name):
    module, _, attribute = name.rpartition(".")
    text = f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(UnsafePickle, match=name):
        unpickle.load(text, where="here")


def test_names_of_frameworks_are_never_imported():
    text = b"cmegatron.no.such.module\nThing\n(S'x'\ntR."
    record = unpickle.load(text, where="here")
    assert isinstance(record, unpickle.Record)
    assert (record.path, record.args) == ("megatron.no.such.module.Thing", ("x",))
    text = b"ctorch\nload\n(S'file'\ntR."
    assert unpickle.load(text, where="here").args == ("file",)


def test_files_outside_the_directory_are_not_read(make, shape, tmp_path):
    root = make.megatron(shape())
    path = root / "iter_0000005" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../../etc/passwd"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(SourceDamaged, match="only files of the directory itself"):
        inspect(root)


def test_every_truncation_of_the_metadata_is_refused(make, shape):
    root = make.megatron(shape(layers=1))
    path = root / "iter_0000005" / ".metadata"
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceDamaged):
            inspect(root / "iter_0000005")


def test_flipped_bytes_of_the_metadata_never_escape(make, shape):
    from flagscale_convert import ConvertError

    root = make.megatron(shape(layers=1))
    path = root / "iter_0000005" / ".metadata"
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        broken = bytearray(whole)
        place = int(torch.randint(len(whole), (1,), generator=generator))
        broken[place] ^= int(torch.randint(1, 256, (1,), generator=generator))
        path.write_bytes(bytes(broken))
        try:
            inspect(root / "iter_0000005")
        except ConvertError:
            continue
