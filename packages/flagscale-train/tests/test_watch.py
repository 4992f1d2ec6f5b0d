import pytest

from flagscale_train.events import Progress
from flagscale_train.watch import _Plain, duration, step_line

START = {
    "event": "start", "time": 0.0, "iteration": 0, "train_iters": 100, "parameters": 1_000_000,
    "tokens_per_step": 4096, "dtype": "float32", "layout": {"world_size": 2, "data": 2, "tensor": 1},
}  # fmt: skip


def step(iteration, time=0.0, **fields):
    return {
        "event": "step", "time": time, "iteration": iteration, "loss": 6.25, "grad_norm": 0.5,
        "learning_rate": 1e-3, "tokens_per_second": 12345.6, "tflops_per_device": 400.0, "mfu": None,
        **fields,
    }  # fmt: skip


def test_a_step_in_one_line():
    progress = Progress.of([START, step(1, 0.0), step(2, 2.0)])
    assert step_line(progress) == (
        "step 2/100  loss 6.2500  grad norm 0.500  lr 1.00e-03  12,346 tokens/s  400 TFLOP/s  3 min left"
    )


def test_a_run_that_is_over_has_no_time_left():
    progress = Progress.of([START, step(1, 0.0), step(2, 2.0)])
    assert "left" not in step_line(progress, is_over=True)


def test_a_known_peak_adds_mfu_and_a_lost_loss_is_nan():
    line = step_line(Progress.of([START, step(1, loss=None, mfu=0.404, memory_bytes=3 << 29, skipped=True)]))
    assert "step 1/100  left out  loss nan" in line
    assert "400 TFLOP/s  MFU 40.4 %  1.5 GiB" in line
    assert "TFLOP/s" not in step_line(Progress.of([START, step(1, tflops_per_device=0.02)]))


def test_nothing_before_the_first_step():
    assert step_line(Progress()) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.2, "3 s"), (89, "89 s"), (120, "2 min"), (12_000, "3 h 20 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_are_few_but_miss_no_event():
    lines = []
    show, progress = _Plain(lines.append), Progress()
    story = [START, *(step(n) for n in range(1, 101))]
    story.insert(50, {"event": "checkpoint", "time": 0.0, "iteration": 49, "path": "/c", "verified": True})
    story.append({"event": "end", "time": 0.0, "iteration": 100, "reason": "finished"})
    for event in story:
        progress.add(event)
        show.event(event, progress)
    assert lines[0] == (
        "training 1,000,000 parameters on 2 processes (data 2), 4,096 tokens per step, float32, from step 0"
    )
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["1/100", "100/100"]
    assert any(line.startswith("saved /c (whole") for line in lines)
    assert lines[-1] == "finished after step 100"
