import json
import math

import pytest

from flagscale_train.events import Journal, Progress, follow, read

START = {"event": "start", "time": 0.0, "iteration": 0, "train_iters": 10, "parameters": 5}


def step(iteration, time, loss=1.0):
    return {"event": "step", "time": time, "iteration": iteration, "loss": loss, "tokens_per_second": 10.0}


def test_a_loss_keeps_every_digit(tmp_path):
    path = tmp_path / "sub" / "events.jsonl"
    Journal(path).write("step", loss=6.1522665023803711, iteration=4)
    (event,) = read(path)
    assert event["loss"] == 6.1522665023803711


def test_what_json_cannot_say_is_null(tmp_path):
    path = tmp_path / "events.jsonl"
    Journal(path).write("step", loss=math.nan, other={"a": [math.inf]}, path=tmp_path)
    (event,) = read(path)
    assert event["loss"] is None
    assert event["other"] == {"a": [None]}
    assert event["path"] == str(tmp_path)
    assert "NaN" not in path.read_text()


def test_two_journals_share_a_file(tmp_path):
    path = tmp_path / "events.jsonl"
    first, second = Journal(path), Journal(path)
    for number in range(50):
        (first, second)[number % 2].write("step", iteration=number)
    assert [event["iteration"] for event in read(path)] == list(range(50))


def test_without_a_file_nothing_is_written():
    Journal(None).write("step", iteration=1)


@pytest.mark.parametrize("torn", ['{"event": "st', '{"event": "step", "iteration": 2}'])
def test_a_torn_last_line_is_no_event(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps(step(1, 0.0)) + "\n" + torn)
    assert [event["iteration"] for event in read(path)] == [1]


def test_a_line_torn_by_a_kill_does_not_hide_later_ones(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "st\n[]\n' + json.dumps(step(2, 0.0)) + "\n")
    assert [event["iteration"] for event in read(path)] == [2]


def test_a_missing_file_has_no_events(tmp_path):
    assert list(read(tmp_path / "none")) == []


def test_follow_gives_each_event_once_and_waits_for_whole_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    events = follow(path)
    assert next(events) is None
    path.write_text(json.dumps(step(1, 0.0)) + "\n" + '{"event": "step", "ti')
    assert next(events)["iteration"] == 1
    assert next(events) is None
    with path.open("a") as stream:
        stream.write('me": 1.0, "iteration": 2}\n')
    assert next(events)["iteration"] == 2
    assert next(events) is None


def test_progress_folds_events():
    progress = Progress.of(
        [
            START,
            step(1, 100.0),
            step(2, 102.0),
            {"event": "eval", "time": 103.0, "iteration": 2, "split": "validation", "loss": 2.5},
            {"event": "eval", "time": 103.0, "iteration": 2, "split": "test", "loss": 9.0},
            {"event": "checkpoint", "time": 103.0, "iteration": 2, "path": "/c", "verified": True},
            step(3, 104.0),
            {"event": "error", "time": 105.0, "rank": 1, "type": "A", "text": "first"},
            {"event": "error", "time": 105.0, "rank": 0, "type": "B", "text": "second"},
        ]
    )
    assert progress.iteration == 3
    assert progress.remaining_s == pytest.approx(7 * 2.0)
    assert progress.validation["loss"] == 2.5
    assert progress.error["text"] == "first"
    assert progress.to_dict()["checkpoint"]["path"] == "/c"


def test_progress_before_the_first_step_is_where_it_resumes():
    progress = Progress.of([{**START, "iteration": 7}])
    assert progress.iteration == 7
    assert progress.remaining_s is None
    assert Progress().iteration == 0
