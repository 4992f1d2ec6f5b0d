import json
import os
import pickle
from dataclasses import dataclass

import pytest

from flagscale_train.checkpoints import TRACKER, choose, fault, prune


@dataclass
class Place:
    relative_path: str
    offset: int
    length: int


@dataclass(frozen=True)
class Key:
    name: str


@dataclass
class Metadata:
    storage_data: dict


def write_checkpoint(root, iteration, *, files=None, data=b"x" * 100):
    folder = root / (iteration if isinstance(iteration, str) else f"iter_{iteration:07d}")
    folder.mkdir(parents=True)
    places = files or {Key("a"): Place("__0_0.distcp", 0, 60), Key("b"): Place("__0_0.distcp", 60, 40)}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(places)))
    (folder / "__0_0.distcp").write_bytes(data)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


def test_a_whole_checkpoint_has_no_fault(tmp_path):
    assert fault(write_checkpoint(tmp_path, 5)) is None


def test_the_newest_is_chosen_by_number_not_by_name_or_tracker(tmp_path):
    for iteration in (9, 10, 10_000_000):
        write_checkpoint(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("9")
    choice = choose(tmp_path)
    assert (choice.iteration, choice.path.name, choice.skipped) == (10_000_000, "iter_10000000", ())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / "metadata.json").unlink(), "metadata.json is missing"),
        (lambda c: (c / "metadata.json").write_text("{"), "metadata.json cannot be read"),
        (lambda c: (c / "metadata.json").write_text("[]"), "names the format None"),
        (lambda c: (c / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "'zarr'"),
        (lambda c: (c / ".metadata").unlink(), ".metadata is missing"),
        (lambda c: (c / ".metadata").write_bytes(b""), ".metadata cannot be read"),
        (
            lambda c: (c / ".metadata").write_bytes((c / ".metadata").read_bytes()[:-9]),
            ".metadata cannot be read",
        ),
        (lambda c: (c / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda c: os.truncate(c / "__0_0.distcp", 99), "99 bytes of 100"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage, reason):
    write_checkpoint(tmp_path, 5)
    damage(write_checkpoint(tmp_path, 10))
    (tmp_path / TRACKER).write_text("10")
    choice = choose(tmp_path)
    assert choice.iteration == 5
    assert len(choice.skipped) == 1
    assert reason in choice.skipped[0]
    assert "iter_0000010" in choice.skipped[0]


def test_a_hostile_pickle_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "broken-in"),)

    folder = write_checkpoint(tmp_path, 5)
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    assert "cannot be read" in fault(folder)
    assert not (tmp_path / "broken-in").exists()


def test_a_path_out_of_the_checkpoint_is_refused(tmp_path):
    (tmp_path / "outside").write_bytes(b"x" * 100)
    folder = write_checkpoint(tmp_path, 5, files={Key("a"): Place("../outside", 0, 10)})
    assert "outside the checkpoint" in fault(folder)


def test_one_step_can_be_asked_for(tmp_path):
    for iteration in (5, 10):
        write_checkpoint(tmp_path, iteration)
    assert choose(tmp_path, 5).iteration == 5
    assert choose(tmp_path, 7).path is None


def test_a_release_is_taken_only_if_nothing_was_trained_since(tmp_path):
    write_checkpoint(tmp_path, "release")
    choice = choose(tmp_path)
    assert (choice.release, choice.iteration) == (True, 0)
    write_checkpoint(tmp_path, 5)
    assert choose(tmp_path).release is False


@pytest.mark.parametrize("name", ["iter_5", "iter_0000005.partial", "notes"])
def test_other_directories_are_not_checkpoints(tmp_path, name):
    write_checkpoint(tmp_path, name)
    assert choose(tmp_path).path is None


def test_no_directory_no_checkpoint(tmp_path):
    assert choose(tmp_path / "none").path is None


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_the_newest_whole_checkpoints_are_kept_and_what_is_older_goes(tmp_path):
    for iteration in (5, 10, 15, 20):
        write_checkpoint(tmp_path, iteration)
    (tmp_path / "iter_0000010" / "metadata.json").unlink()
    assert [path.name for path in prune(tmp_path, 2, 20)] == ["iter_0000005", "iter_0000010"]
    assert names(tmp_path) == ["iter_0000015", "iter_0000020"]


def test_a_checkpoint_that_is_not_whole_does_not_count(tmp_path):
    for iteration in (5, 10, 15):
        write_checkpoint(tmp_path, iteration)
    os.truncate(tmp_path / "iter_0000015" / "__0_0.distcp", 50)
    prune(tmp_path, 1, 15)
    assert choose(tmp_path).iteration == 10, "the newest whole one"
    assert prune(tmp_path, 2, 15) == (), "one whole checkpoint is fewer than two"


def test_what_was_saved_last_stays_beside_newer_ones_of_an_earlier_run(tmp_path):
    for iteration in (5, 6, 10, 15):
        write_checkpoint(tmp_path, iteration)
    (tmp_path / "release").mkdir()
    (tmp_path / "iter_0000001").symlink_to(tmp_path / "iter_0000015")
    prune(tmp_path, 2, 6)
    assert names(tmp_path) == ["iter_0000001", "iter_0000006", "iter_0000010", "iter_0000015", "release"]
