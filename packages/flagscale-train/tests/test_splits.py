"""Data that would not end well are refused by the plan, with the numbers."""

import json
from array import array

import pytest

from flagscale_train import splits
from flagscale_train.cli import main
from flagscale_train.data import indexed
from flagscale_train.data.indexed import IndexedDataset, IndexedWriter, Sizes, files_of
from flagscale_train.errors import InvalidInput


def write(prefix, count, *, highest=5):
    with IndexedWriter(prefix, "H") as writer:
        for _ in range(count):
            writer.add(array("H", [1, 2, highest]).tobytes(), [3])
    return prefix


def refused(capsys, experiment, *overrides):
    assert main(["plan", str(experiment), *overrides]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("split", "count", "expected"),
    [
        ("98,2,0", 24, (24, 0, None)),
        ("98,2,0", 25, (24, 1, None)),
        ("98,2,0", 26, (25, 1, None)),
        ("969, 30, 1", 300, (291, 9, 0)),
        ("1", 7, (7, None, None)),
        ("8,1,1", 10, (8, 1, 1)),
    ],
)
def test_shares_of_documents(split, count, expected):
    assert splits.shares(split, count) == expected


def test_a_share_without_documents_is_refused_with_the_numbers(experiment_file, tmp_path, capsys):
    data = f"train.data.data_path={write(tmp_path / 'few', 24)}"
    error = refused(capsys, experiment_file, data, "train.data.split='98,2,0'")
    assert "split: 98,2,0: validation gets 2.00% of 24 documents" in error
    assert "give it a larger share or 0, or more documents" in error
    for good in ("90,10,0", "1,0,0"):
        # Where Megatron is not installed the plan says that, and nothing of the split.
        main(["plan", str(experiment_file), data, f"train.data.split='{good}'"])
        assert "split" not in capsys.readouterr().err


def test_megatrons_own_split_counts_where_none_is_given(experiment_file, tmp_path, capsys):
    data = f"train.data.data_path={write(tmp_path / 'few', 300)}"
    error = refused(capsys, experiment_file, data, "~train.data.split")
    assert "split: 969, 30, 1: test gets 0.10% of 300 documents" in error


def test_one_dataset_of_a_blend_is_enough_to_refuse(experiment_file, tmp_path, capsys):
    many, few = write(tmp_path / "many", 1000), write(tmp_path / "few", 4)
    error = refused(capsys, experiment_file, f"train.data.data_path=[9,{many},1,{few}]")
    assert "validation gets 10.00% of 4 documents" in error
    assert str(many) not in error


@pytest.mark.parametrize("split", ["0,0,0", "none", "1,1,1,1", "1.2.3"])
def test_a_split_that_is_none_is_refused(experiment_file, capsys, split):
    assert "give numbers such as 98,2,0" in refused(
        capsys, experiment_file, f"train.data.split={json.dumps(split)!r}".replace("'", "'", 1)
    )


def test_weights_of_nothing_are_refused(experiment_file, tmp_path, capsys):
    one, two = write(tmp_path / "one", 100), write(tmp_path / "two", 100)
    error = refused(capsys, experiment_file, f"train.data.data_path=[1,{one},0,{two}]")
    assert f"data_path: weight 0 of {two}: must be above 0" in error


def test_a_split_and_data_of_each_split_exclude_each_other(experiment_file, tmp_path, capsys):
    own = f"+train.data.train_data_path={write(tmp_path / 'own', 10)}"
    assert "more than one source of data" in refused(capsys, experiment_file, own)
    error = refused(capsys, experiment_file, own, "~train.data.data_path")
    assert "split: 90,10,0: train_data_path names the data of one split already" in error


def test_data_of_a_split_without_documents_are_refused(experiment_file, tmp_path, capsys):
    words = ["~train.data.data_path", "~train.data.split"]
    words += [f"+train.data.train_data_path={write(tmp_path / 'own', 10)}"]
    words += [f"+train.data.valid_data_path={write(tmp_path / 'none', 0)}"]
    assert f"valid_data_path: {tmp_path / 'none'}: holds no document" in refused(
        capsys, experiment_file, *words
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda index: index[:-8], "its counts need"),
        (lambda index: b"nothing", "does not begin as an index does"),
        (lambda index: index[:-8] + bytes(8), "do not cover the sequences"),
        (lambda index: index[:34] + b"\x04" + index[35:], "is said to lie at byte"),
    ],
)
def test_a_damaged_index_is_refused_before_the_start(experiment_file, tmp_path, capsys, damage, said):
    index = files_of(write(tmp_path / "d", 50))[1]
    index.write_bytes(damage(index.read_bytes()))
    error = refused(capsys, experiment_file, f"train.data.data_path={tmp_path / 'd'}")
    assert f"data_path: {index}: " in error
    assert said in error


def test_the_ends_of_a_large_index_tell_enough(tmp_path, monkeypatch):
    prefix = write(tmp_path / "d", 50)
    whole = IndexedDataset.open(prefix).sizes
    monkeypatch.setattr(indexed, "_SMALL_INDEX_BYTES", 0)
    assert Sizes.glance(prefix) == whole == Sizes("H", 50, 50, 150)
    ids, index = files_of(prefix)
    good = index.read_bytes()
    for bad in (good[:-8], good[:-8] + bytes(8), good[:5], b""):
        index.write_bytes(bad)
        with pytest.raises(InvalidInput, match="not a whole dataset"):
            Sizes.glance(prefix)
    index.write_bytes(good)
    ids.write_bytes(ids.read_bytes()[:-2])
    with pytest.raises(InvalidInput, match="need 300 bytes, their file has 298"):
        Sizes.glance(prefix)


def test_ids_beyond_the_vocabulary_are_found_without_the_makers_word(experiment_file, tmp_path, capsys):
    data = f"train.data.data_path={write(tmp_path / 'd', 50, highest=700)}"
    assert "the data hold token 700, the vocabulary ends at 511" in refused(capsys, experiment_file, data)
