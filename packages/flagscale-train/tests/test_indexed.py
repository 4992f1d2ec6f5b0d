import struct
from array import array

import pytest

from flagscale_train.data.indexed import IndexedWriter, files_of, typecode_for


def write(prefix, documents, typecode="H"):
    with IndexedWriter(prefix, typecode) as writer:
        for ids in documents:
            writer.add(array(typecode, ids).tobytes(), [len(ids)])


@pytest.mark.parametrize(("typecode", "code", "size"), [("H", 8, 2), ("i", 4, 4)])
def test_the_index_is_megatrons(tmp_path, typecode, code, size):
    write(tmp_path / "data.v1", [[1, 2, 3], [4], [5, 6]], typecode)
    bin_path, idx_path = files_of(tmp_path / "data.v1")
    assert bin_path.name == "data.v1.bin"
    assert array(typecode, bin_path.read_bytes()).tolist() == [1, 2, 3, 4, 5, 6]
    index = idx_path.read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", index, 9) == (1, code, 3, 4)
    assert struct.unpack_from("<3i", index, 34) == (3, 1, 2)
    assert struct.unpack_from("<3q", index, 46) == (0, 3 * size, 4 * size)
    assert struct.unpack_from("<4q", index, 70) == (0, 1, 2, 3)
    assert len(index) == 102


def test_many_documents_take_the_path_of_chunks(tmp_path):
    count = (1 << 16) + 3
    with IndexedWriter(tmp_path / "many", "H") as writer:
        writer.add(b"\x01\x00" * count, [1] * count)
    index = files_of(tmp_path / "many")[1].read_bytes()
    offsets = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    boundaries = struct.unpack_from(f"<{count + 1}q", index, 34 + 12 * count)
    assert offsets == tuple(range(0, 2 * count, 2))
    assert boundaries == tuple(range(count + 1))


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with IndexedWriter(tmp_path / "data", "H") as writer:
            writer.add(b"\x01\x00", [1])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_dataset(tmp_path):
    write(tmp_path / "data", [[1, 2]])
    before = {path: path.read_bytes() for path in files_of(tmp_path / "data")}
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "data", "H"):
        raise RuntimeError
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("size", "typecode"), [(65499, "H"), (65500, "i"), (151936, "i")])
def test_the_type_is_megatrons_choice(size, typecode):
    assert typecode_for(size) == typecode
