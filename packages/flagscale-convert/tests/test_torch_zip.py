"""Archives inside files: torch reads what is written here, and what torch writes is read here."""

from __future__ import annotations

import io
import os
import zipfile
import zlib

import numpy as np
import pytest
import torch

from flagscale_convert import SourceDamaged, Unsupported
from flagscale_convert.dcp_layout import _Chunk, _frame
from flagscale_convert.pickling import Call, Global, New, dump
from flagscale_convert.tensors import TensorInfo
from flagscale_convert.torch_zip import TensorFrame, find_tensor, object_archive, read_object

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5,), (1, 3, 4), (2, 0), ()])
@pytest.mark.parametrize("restricted", [True, False])
def test_torch_loads_what_is_framed(dtype, size, restricted):
    tensor = torch.randn(size).to(DTYPES[dtype])
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    frame = _frame(_Chunk("a", "a", (0,) * len(size), size, dtype))
    head, tail = frame.render(zlib.crc32(data))
    whole = head + data + tail
    assert (len(head), len(whole)) == (frame.head_bytes, frame.total_bytes)
    assert len(head) % 64 == 0
    assert zipfile.ZipFile(io.BytesIO(whole)).testzip() is None
    loaded = torch.load(io.BytesIO(whole), weights_only=restricted)
    assert loaded.dtype == tensor.dtype
    assert loaded.shape == tensor.shape
    assert torch.equal(loaded, tensor)


def test_torch_loads_written_objects():
    value = {"a": [None, True, 1, -5, 1 << 40, -(1 << 70), 1.5, "é", ("x",), {}], "b": []}
    assert torch.load(io.BytesIO(object_archive(dump(value))), weights_only=True) == value
    described = New(Global("argparse", "Namespace"), {"dtype": Global("torch", "bfloat16"), "n": 3})
    loaded = torch.load(io.BytesIO(object_archive(dump(described))), weights_only=False)
    assert (loaded.dtype, loaded.n) == (torch.bfloat16, 3)
    assert torch.load(
        io.BytesIO(object_archive(dump(Call(Global("torch", "Size"), ((2, 3),))))), weights_only=True
    ) == (2, 3)


def test_unknown_objects_are_not_pickled():
    with pytest.raises(TypeError, match="set"):
        dump({1, 2})


@pytest.fixture
def saved(tmp_path):
    """A tensor saved by torch behind some other bytes; gives descriptor, offset, length and values."""
    tensor = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    path = tmp_path / "file"
    path.write_bytes(b"x" * 777 + buffer.getvalue() + b"y" * 99)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor, 777, len(buffer.getvalue()), tensor
    os.close(descriptor)


def test_bytes_are_found_in_place(saved):
    descriptor, offset, length, tensor = saved
    place = find_tensor(descriptor, offset, length, TensorInfo("F32", (5, 12)), where="here")
    found = np.frombuffer(os.pread(descriptor, place.length, place.offset), np.float32)
    assert found.tolist() == tensor.flatten().tolist()


def test_a_view_into_a_larger_storage(tmp_path):
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    torch.save(base[2:4], tmp_path / "file")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    place = find_tensor(
        descriptor, 0, (tmp_path / "file").stat().st_size, TensorInfo("F32", (2, 12)), where="here"
    )
    assert np.frombuffer(os.pread(descriptor, place.length, place.offset), np.float32).tolist() == list(
        range(24, 48)
    )
    os.close(descriptor)


def test_other_shapes_and_strides_are_refused(saved, tmp_path):
    descriptor, offset, length, tensor = saved
    with pytest.raises(SourceDamaged, match=r"stored shape \(\[5, 12\]\)"):
        find_tensor(descriptor, offset, length, TensorInfo("F32", (6, 10)), where="here")
    with pytest.raises(SourceDamaged, match="uncompressed ones are needed"):
        find_tensor(descriptor, offset, length, TensorInfo("F64", (5, 12)), where="here")
    torch.save(tensor.T, tmp_path / "transposed")
    other = os.open(tmp_path / "transposed", os.O_RDONLY)
    with pytest.raises(Unsupported, match="only contiguous"):
        find_tensor(
            other, 0, (tmp_path / "transposed").stat().st_size, TensorInfo("F32", (12, 5)), where="here"
        )
    os.close(other)


def test_no_archive_is_told(saved):
    descriptor, offset, length, _ = saved
    for start, size in ((0, 700), (offset, length - 30), (offset + 10, 5), (offset, 0)):
        with pytest.raises(SourceDamaged, match=r"no whole archive|holds no|cannot be read"):
            read_object(descriptor, start, size, where="here")


def test_compressed_data_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save(torch.zeros(500), buffer)
    with zipfile.ZipFile(tmp_path / "file", "w", zipfile.ZIP_DEFLATED) as target:
        for member in zipfile.ZipFile(buffer).infolist():
            target.writestr(member.filename, zipfile.ZipFile(buffer).read(member))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(SourceDamaged, match="compression 8"):
        find_tensor(
            descriptor, 0, (tmp_path / "file").stat().st_size, TensorInfo("F32", (500,)), where="here"
        )
    os.close(descriptor)


def test_tensors_beyond_four_gigabytes(tmp_path):
    size = (1 << 30) + 16
    frame = TensorFrame(_frame(_Chunk("a", "a", (0,), (size,), "F32")).pickled, size * 4)
    head, tail = frame.render(0)
    with (tmp_path / "file").open("wb") as stream:  # a hole: no disk is used
        stream.write(head)
        stream.seek(size * 4 - 4, os.SEEK_CUR)
        stream.write(np.float32(42).tobytes())
        stream.write(tail)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    place = find_tensor(descriptor, 0, frame.total_bytes, TensorInfo("F32", (size,)), where="here")
    assert place.offset == len(head)
    assert np.frombuffer(os.pread(descriptor, 4, place.offset + place.length - 4), np.float32)[0] == 42
    os.close(descriptor)
    loaded = torch.load(tmp_path / "file", mmap=True, weights_only=True)
    assert loaded.shape == (size,)
    assert loaded[-1] == 42
