"""Real training by Megatron, through the command line, on this machine's CPU.

Differences of losses and gradient norms are absolute, in fp32; the losses are near 6, the norms near 1.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagscale_train.checkpoints import choose

pytestmark = pytest.mark.megatron

TWO_PROCESSES = ["experiment.runner.nproc_per_node=2"]


class Command:
    """`flagscale-train` as a process of its own."""

    def __init__(self, state_dir):
        self.env = {**os.environ, "FLAGSCALE_STATE_DIR": str(state_dir)}

    def start(self, *words, **options):
        argv = [sys.executable, "-m", "flagscale_train.cli", *map(str, words)]
        return subprocess.Popen(
            argv, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )

    def run(self, *words, code=0, timeout_s=600):
        process = self.start(*words)
        out, err = process.communicate(timeout=timeout_s)
        assert process.returncode == code, f"{words}: {process.returncode}\n{out}\n{err}"
        return out if code == 0 else err

    def status(self, run_dir, code=0):
        """Return what `status` says of a run; its facts go to standard output whatever the exit code."""
        process = self.start("status", run_dir, "--json")
        out, err = process.communicate(timeout=600)
        assert process.returncode == code, f"status of {run_dir}: {process.returncode}\n{out}\n{err}"
        return json.loads(out)


def events_of(run_dir, kind):
    path = Path(run_dir) / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["event"] == kind]


def wait_for(condition, what, deadline_s=120.0):
    """Poll until `condition` gives something true, and return it."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {deadline_s} s: {what}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def command(place):
    return Command(place / "state")


@pytest.fixture(scope="module")
def experiment(place, write_experiment):
    return write_experiment(place)


def exp_dir(folder):
    return f"experiment.exp_dir={folder}"


def curve(folder):
    """Loss and gradient norm by iteration over all runs of an experiment, the last run winning."""
    found = {}
    for run_dir in sorted((folder / "runs").glob("[0-9]*")):
        for step in events_of(run_dir, "step"):
            found[step["iteration"]] = (step["loss"], step["grad_norm"])
    return found


def difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(abs(a - b) for step in ours for a, b in zip(ours[step], theirs[step], strict=True))


@pytest.fixture(scope="module")
def whole(command, experiment, place):
    """Twenty uninterrupted steps on one process, saved every five."""
    folder = place / "whole"
    out = command.run("run", experiment, exp_dir(folder))
    assert "step 20/20" in out
    return folder


def start_at(folder, whole, step):
    """Make an experiment directory whose newest checkpoint is that of `step`."""
    shutil.copytree(whole / "checkpoints" / f"iter_{step:07d}", folder / "checkpoints" / f"iter_{step:07d}")


def test_a_run_tells_its_story(whole, command):
    run_dir = (whole / "runs" / "latest").resolve()
    (start,) = events_of(run_dir, "start")
    assert start["tokens_per_step"] == 8 * 32
    assert start["dtype"] == "float32"
    assert start["parameters"] == 512 * 64 + 64 + 2 * (
        64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 176 + 2 * 64 + 2 * 16
    )
    steps = events_of(run_dir, "step")
    assert [step["iteration"] for step in steps] == list(range(1, 21))
    assert steps[0]["loss"] == pytest.approx(math.log(512), abs=0.2)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert [step["learning_rate"] for step in steps[:3]] == pytest.approx([0.0, 5e-4, 1e-3])
    assert all(step["tokens_per_second"] > 0 and step["memory_bytes"] > 0 for step in steps)
    assert [saved["iteration"] for saved in events_of(run_dir, "checkpoint")] == [5, 10, 15, 20]
    assert all(saved["verified"] for saved in events_of(run_dir, "checkpoint"))
    assert {held_out["iteration"] for held_out in events_of(run_dir, "eval")} == {10, 20}
    assert events_of(run_dir, "end")[0]["reason"] == "finished"
    told = command.status(run_dir)
    assert (told["state"], told["progress"]["iteration"]) == ("succeeded", 20)
    assert "successfully saved checkpoint" in command.run("logs", run_dir)
    assert str(run_dir) in command.run("list")


def test_a_stopped_run_resumes_bit_by_bit_and_passes_over_half_a_checkpoint(
    command, experiment, whole, place
):
    folder = place / "stopped"
    words = ["run", experiment, exp_dir(folder), "+train.model.exit_interval=7"]
    command.run(*words)
    assert sorted(curve(folder)) == list(range(1, 8))
    assert events_of(folder / "runs" / "latest", "end")[0]["reason"] == "interrupted by a limit"
    # What a save that was cut off leaves behind, with the tracker file pointing at it.
    shutil.copytree(folder / "checkpoints" / "iter_0000007", folder / "checkpoints" / "iter_0000009")
    (folder / "checkpoints" / "iter_0000009" / "metadata.json").unlink()
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("9")
    out = command.run("run", experiment, exp_dir(folder))
    assert "iter_0000009 is not whole (metadata.json is missing" in out
    assert "resuming from" in out
    assert sorted(step["iteration"] for step in events_of(folder / "runs" / "latest", "step")) == list(
        range(8, 21)
    )
    assert difference(curve(folder), curve(whole)) == 0
    again = command.run("run", experiment, exp_dir(folder))
    assert "trained to its last step already" in again, "nothing is left to train, and nothing is harmed"
    assert command.run("status", folder)


def test_stop_saves_and_says_so(command, experiment, place):
    folder = place / "asked"
    words = [
        experiment,
        exp_dir(folder),
        "train.model.train_iters=100000",
        "train.system.checkpoint.save_interval=100000",
    ]
    run_dir = Path(command.run("run", *words, "--detach").splitlines()[0])
    wait_for(lambda: len(events_of(run_dir, "step")) > 3, "four steps")
    assert "being trained already" in command.run("run", *words, code=2)
    assert "stopped after step" in command.run("stop", run_dir)
    (saved,) = events_of(run_dir, "checkpoint")
    last = events_of(run_dir, "step")[-1]["iteration"]
    assert (saved["iteration"], saved["verified"]) == (last, True)
    assert events_of(run_dir, "end")[0]["reason"] == "stopped"
    assert command.status(run_dir)["state"] == "stopped"
    command.run("stop", run_dir, code=3)
    assert_nothing_left(run_dir)


def processes_of(run_dir):
    """Return the pids that carry the run's directory in their environment or words, but for this test's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marks = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
            zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if str(run_dir).encode() in marks and not zombie and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def assert_nothing_left(run_dir, deadline_s=10.0):
    end = time.monotonic() + deadline_s
    while left := processes_of(run_dir):
        assert time.monotonic() < end, f"still there after {deadline_s} s: {left}"
        time.sleep(0.05)


def worker_of(run_dir):
    """Return the pid of a rank: a process of the run that torchrun gave one to."""
    for pid in processes_of(run_dir):
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        if b"\0LOCAL_RANK=1\0" in b"\0" + environment:
            return pid
    raise AssertionError("no worker")


def supervisor_of(run_dir):
    return json.loads((run_dir / "supervisor.json").read_text())["supervisor"]["pid"]


LONG = "train.model.train_iters=100000"
VICTIMS = {
    "launcher": (lambda process, _: process.pid, "launcher"),
    "supervisor": (lambda _, run_dir: supervisor_of(run_dir), "supervisor"),
    "worker": (lambda _, run_dir: worker_of(run_dir), "SIGKILL"),
}


def half_written(folder):
    """Return a checkpoint that is being written: its data are not described yet."""
    for path in sorted((folder / "checkpoints").glob("iter_*")):
        if next(path.glob("*.distcp"), None) and not (path / "metadata.json").exists():
            return path
    return None


@pytest.mark.parametrize("victim", VICTIMS)
def test_kill_9_leaves_nothing_tells_what_happened_and_resume_works(
    victim, command, experiment, whole, place
):
    pid_of, word = VICTIMS[victim]
    folder = place / f"killed-{victim}"
    words = ["run", experiment, exp_dir(folder), *TWO_PROCESSES]
    is_saving = victim == "worker"
    if is_saving:  # it dies while a checkpoint is written in the background
        words += ["+train.system.checkpoint.async_save=true", "train.system.checkpoint.save_interval=2"]
    process = command.start(*words, LONG)
    try:
        run_dir = wait_for(lambda: next(iter((folder / "runs").glob("[0-9]*")), None), "a run directory")
        wait_for(lambda: events_of(run_dir, "checkpoint"), "a checkpoint")
        victims_pid = pid_of(process, run_dir)
        if is_saving:
            half = wait_for(lambda: half_written(folder), "a checkpoint that is being written")
        os.kill(victims_pid, signal.SIGKILL)
        assert_nothing_left(run_dir)
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == (-signal.SIGKILL if victim == "launcher" else 4), (out, err)
    told = command.status(run_dir, code=4)
    assert told["state"] == "failed"
    assert word in told["what_happened"]
    saved = choose(folder / "checkpoints")
    if is_saving and saved.path != half:  # which may have become whole in the instant between
        assert half.name in saved.skipped[-1], "half a checkpoint is left, newer than the one chosen"
    before = curve(folder)
    last = saved.iteration + 2
    # As long as before: on the length depends in which order the data come.
    command.run(*words, LONG, f"+train.model.exit_interval={last}")
    resumed = events_of((folder / "runs" / "latest").resolve(), "step")
    assert [step["iteration"] for step in resumed] == [last - 1, last]
    again = {step["iteration"]: (step["loss"], step["grad_norm"]) for step in resumed}
    assert all(again[step] == before[step] for step in again.keys() & before.keys()), "bit by bit"
    page = Path(command.run("report", folder).strip()).read_text()
    assert "2 runs" in page
    assert word in page, "the report tells of the kill"
    assert f"after step {last}" in page


def test_a_failure_in_training_is_told_with_its_cause(command, experiment, whole, place):
    folder = place / "other"
    start_at(folder, whole, 5)
    err = command.run("run", experiment, exp_dir(folder), "train.model.num_layers=3", code=4)
    assert "a checkpoint of another model: num_layers: 3: it has 2" in err
    assert "Traceback" not in err
    told = command.status(folder, code=4)
    assert "num_layers" in told["what_happened"]


def test_another_schedule_is_refused_with_the_cure(command, experiment, whole, place):
    folder = place / "schedule"
    start_at(folder, whole, 5)
    err = command.run("run", experiment, exp_dir(folder), "train.model.optimizer.lr_decay_iters=99", code=4)
    assert "override_opt_param_scheduler" in err
    assert "rank 0: Refusal" in err


def test_a_full_disk_fails_clearly_and_the_checkpoint_before_is_kept(command, experiment, whole, place):
    folder = place / "full"
    start_at(folder, whole, 5)
    size = sum(path.stat().st_size for path in (folder / "checkpoints" / "iter_0000005").glob("*.distcp"))
    # A limit on the size of files stands for a disk that is full: half of the next checkpoint fits.
    limit = f"+experiment.cmds.before_start=ulimit -f {size // 2 // 1024}"
    err = command.run("run", experiment, exp_dir(folder), limit, code=4)
    assert "SaveError" in err
    assert "File too large" in err
    assert "make room" in err
    out = command.run("run", experiment, exp_dir(folder))
    assert "resuming from" in out
    assert "iter_0000005" in out
    assert (
        difference(
            {n: v for n, v in curve(folder).items() if n > 5},
            {n: v for n, v in curve(whole).items() if n > 5},
        )
        == 0
    )


def test_logits_do_not_depend_on_who_asks(command, experiment, whole, place):
    from safetensors.numpy import load_file

    tokens = place / "tokens.json"
    tokens.write_text(json.dumps([[(3 * n + row) % 512 for n in range(24)] for row in range(2)]))
    out = place / "out" / "logits.safetensors"
    bf16 = "+train.system.bf16=true"  # training precision has no say in it
    command.run("logits", experiment, exp_dir(whole), bf16, "--tokens", tokens, "--output", out)
    logits = load_file(out)["logits"]
    assert logits.shape == (2, 24, 512)
    assert str(logits.dtype) == "float32"
    # A row's logits are the same alone and in a batch, and causal: what follows has no influence.
    rows = json.loads(tokens.read_text())
    tokens.write_text(json.dumps([rows[1][:10]]))
    command.run("logits", experiment, exp_dir(whole), "--tokens", tokens, "--output", out)
    assert abs(load_file(out)["logits"][0] - logits[1][:10]).max() < 1e-5


@pytest.mark.filterwarnings("ignore")  # importing Megatron warns of what is not installed
def test_megatrons_reader_reads_what_tokenize_wrote(command, place):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import AutoTokenizer

    texts = [f"document {number}: " + "word " * number for number in range(20)]
    lines, prefix, tokenizer = place / "texts.jsonl", place / "tokenized" / "texts", place / "tokenizer"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command.run("data", "train-tokenizer", lines, "--vocab-size", 280, "--output", tokenizer)
    command.run("data", "tokenize", lines, "--tokenizer", tokenizer, "--output", prefix, "--workers", 2)
    reader, dataset = AutoTokenizer.from_pretrained(tokenizer), IndexedDataset(str(prefix))
    assert len(dataset) == len(texts)
    assert reader.eos_token_id != reader.pad_token_id
    for text, ids in zip(texts, dataset, strict=True):
        assert ids[-1] == reader.eos_token_id
        assert reader.decode(ids[:-1]) == text
