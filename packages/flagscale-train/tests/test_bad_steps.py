"""Steps that are no good, planted into real training on the CPU: left out, rolled back, or the run's end."""

import os

import pytest
from trainings import events, train_job

import flagscale_hw as hw
from flagscale_config import load
from flagscale_train import plan
from flagscale_train.checkpoints import choose
from flagscale_train.findings import examine

pytestmark = pytest.mark.megatron

STEPS, BAD = 10, 7
BAD_STEPS, CHECKPOINTS = "+experiment.runner.bad_steps.", "+experiment.runner.checkpoints."
CASES = {
    # rules, what is planted, whether the run fails
    "clean": ([], None, False),
    "skip-nan": ([f"{BAD_STEPS}action=skip"], (BAD, "nan"), False),
    "skip-spike": ([f"{BAD_STEPS}action=skip", f"{BAD_STEPS}spike_threshold=0.5"], (BAD, "2"), False),
    "stop-nan": ([], (BAD, "nan"), True),
    "stop-spike": (["+train.system.check_for_spiky_loss=true"], (BAD, "11"), True),
    "unwatched": (["+train.system.no_check_for_nan_in_loss_and_grad=true"], (BAD, "2"), False),
    "all-bad": ([f"{BAD_STEPS}action=skip", f"{BAD_STEPS}patience=2"], (None, "inf"), True),
    # What Megatron calls a limit of time: over before it began, so that it ends after the first step.
    "out-of-time": (["+train.model.exit_duration_in_mins=1"], None, False),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_experiment, run_forked):
    """Train every case from the same start, and return the folder of it all."""
    folder = tmp_path_factory.mktemp("bad-steps")
    experiment = write_experiment(folder)
    run_forked(folder, [job(experiment, folder / name, *case) for name, case in CASES.items()])
    return folder


def job(experiment, folder, overrides, planted, fails):
    words = [f"train.model.train_iters={STEPS}", "train.model.eval_iters=0", *overrides]
    made = train_job(experiment, folder, words)
    if "--exit-duration-in-mins" in made["argv"]:
        made["argv"][made["argv"].index("--exit-duration-in-mins") + 1] = "-1"
    return {**made, "fails": fails, **({"plant": planted} if planted else {})}


def test_a_step_that_is_no_number_is_left_out_and_the_rest_trains_on(place):
    steps, clean = events(place / "skip-nan", "step"), events(place / "clean", "step")
    assert [step["iteration"] for step in steps] == list(range(1, STEPS + 1))
    assert [step["iteration"] for step in steps if step.get("skipped")] == [BAD]
    assert steps[BAD - 1]["not_finite"] == ["loss", "grad_norm"]
    assert [step["loss"] for step in steps[: BAD - 1]] == [step["loss"] for step in clean[: BAD - 1]]
    assert all(step["loss"] < 7 for step in steps[BAD:]), "the weights are untouched"
    # The update that was dropped is missing in what follows.
    assert steps[BAD]["loss"] != clean[BAD]["loss"]
    (notice,) = (event["text"] for event in events(place / "skip-nan", "notice"))
    assert notice == f"step {BAD} is left out: the loss is nan"
    assert events(place / "skip-nan", "end")[0]["reason"] == "finished"


def test_a_spike_is_left_out_by_the_rule_that_was_given(place):
    steps = events(place / "skip-spike", "step")
    assert [step["iteration"] for step in steps if step.get("skipped")] == [BAD]
    (notice,) = (event["text"] for event in events(place / "skip-spike", "notice"))
    assert "more than 50% is a spike" in notice
    assert not any(step.get("skipped") for step in events(place / "unwatched", "step"))


@pytest.mark.parametrize(("case", "why"), [("stop-nan", "nan"), ("stop-spike", "is a spike")])
def test_by_default_a_bad_step_ends_the_run_before_its_update(place, case, why):
    assert events(place / case, "step")[-1]["iteration"] == BAD - 1
    error = events(place / case, "error")[0]
    assert error["text"].startswith(f"step {BAD}: the loss ")
    assert why in error["text"]
    assert choose(place / case / "checkpoints").iteration == 5
    assert events(place / case, "end") == []


def test_when_every_step_is_bad_patience_ends(place):
    assert len(events(place / "all-bad", "notice")) == 2
    (error,) = events(place / "all-bad", "error")
    assert error["text"] == (
        "step 3: the loss is inf: stopped before the update; 2 steps before it were left out already"
    )


def test_at_the_limit_of_time_a_run_saves_and_ends_clean(place):
    (end,) = events(place / "out-of-time", "end")
    assert (end["iteration"], end["reason"]) == (1, "interrupted by a limit")
    assert choose(place / "out-of-time" / "checkpoints").iteration == 1


PLANT = """
import importlib.abc, importlib.util, os, sys

class Planter(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "flagscale_train.worker.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def load_and_plant(module):
            load(module)
            real = module._fold
            def fold(mask, losses):
                from megatron.training import get_args
                return real(mask, losses * float("nan") if get_args().curr_iteration + 1 == 7 else losses)
            module._fold = fold
        spec.loader.exec_module = load_and_plant
        return spec

sys.meta_path.insert(0, Planter())
"""


def test_two_hosts_roll_back_past_the_bad_data_and_keep_the_newest_checkpoints_alone(
    tmp_path, write_experiment
):
    (tmp_path / "plant").mkdir()
    (tmp_path / "plant" / "sitecustomize.py").write_text(PLANT)
    paths = [str(tmp_path / "plant"), *filter(None, [os.environ.get("PYTHONPATH")])]
    words = [
        "experiment.runner.nproc_per_node=1",
        f"+experiment.envs.PYTHONPATH='{os.pathsep.join(paths)}'",
        f"train.model.train_iters={STEPS}",
        "train.model.eval_iters=0",
        "train.system.checkpoint.save_interval=2",
        "+train.system.checkpoint.async_save=true",
        f"{CHECKPOINTS}keep_last=2",
        f"{BAD_STEPS}action=roll_back",
    ]
    experiment = load(write_experiment(tmp_path), words, task="train")
    # Two hosts that are this one: each has a supervisor and a torchrun of its own.
    targets = [hw.Target(name=name, transport="local", address="127.0.0.1") for name in ("one", "two")]
    nodes = [hw.Node(target=target, machine=hw.detect(), interface="lo") for target in targets]
    planned = plan(experiment, hw.detect(), nodes=nodes, findings=examine(experiment))
    run = hw.launch(planned, tmp_path / "run")
    ended = run.wait(timeout_s=300)
    assert ended.state == "succeeded", "\n".join(line.text for line in run.logs())[-3000:]
    first_host = tmp_path / "run" / "hosts" / "one"
    # Step 7 was bad; the newest whole checkpoint was that of step 6 or, while 6 was being written, of step 4.
    (rolled,) = (event["text"] for event in events(first_host, "notice") if "rolling back" in event["text"])
    first = int(rolled.partition("iter_")[2][:7]) + 1
    assert first in (5, 7)
    assert f"leaving out the data of steps {first} to 7" in rolled
    trained = [step["iteration"] for step in events(first_host, "step")]
    assert trained == [*range(1, 7), *range(8, STEPS + 1)]
    saved = events(first_host, "checkpoint")
    assert all(event["verified"] for event in saved)
    assert saved[-1]["iteration"] == STEPS
    kept = sorted(path.name for path in (tmp_path / "exp" / "checkpoints").glob("iter_*"))
    assert kept == ["iter_0000008", "iter_0000010"]
    assert choose(tmp_path / "exp" / "checkpoints").iteration == STEPS
