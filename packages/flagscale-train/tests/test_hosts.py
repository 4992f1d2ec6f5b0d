"""Plans for several hosts, hostfiles, and what other launchers get; runs over real ssh are in tests/hosts."""

import json
import subprocess

import pytest

import flagscale_hw as hw
from flagscale_config import load
from flagscale_hw.testing import fake_host
from flagscale_train import InvalidInput, plan
from flagscale_train.cli import main
from flagscale_train.findings import Findings
from flagscale_train.hosts import targets_of
from flagscale_train.runs import _OWN_FAILURE, status


def node(name, *, chip="nvidia", count=8, slots=None, kind=None, interface="eth1"):
    return hw.Node(
        target=hw.Target(name=name),
        machine=fake_host(chip, count),
        interface=interface,
        slots=slots,
        type=kind,
    )


def planned(experiment_file, nodes, *overrides):
    given = ["~experiment.runner.nproc_per_node", "train.model.global_batch_size=64", *overrides]
    experiment = load(experiment_file, given, task="train")
    return plan(experiment, nodes[0].machine, nodes=nodes, python="python", findings=Findings())


def test_every_host_knows_its_rank_and_where_all_meet(experiment_file):
    made = planned(experiment_file, [node("a"), node("10.0.0.2")])
    assert [(process.name, process.host, process.rank) for process in made.processes] == [
        ("train-0", "a", 0),
        ("train-1", "10.0.0.2", 1),
    ]
    words = made.processes[1].argv
    assert {
        "--nnodes=2",
        "--node-rank={node_rank}",
        "--rdzv-backend=static",
        "--master-addr={address:a}",
        "--master-port={port:rendezvous}",
        "--local-addr={own_address}",
        "--nproc-per-node=8",
    } <= set(words)
    assert "--standalone" not in words
    assert made.ports == {"rendezvous": None}
    assert made.owner_of("rendezvous") == "a"
    assert made.facts["layout"]["processes"] == 16
    assert (
        made.processes[0].env["NCCL_SOCKET_IFNAME"] == made.processes[0].env["GLOO_SOCKET_IFNAME"] == "eth1"
    )


def test_a_plan_for_hosts_is_the_same_every_time(experiment_file):
    nodes = [node("a"), node("b")]
    assert planned(experiment_file, nodes).to_json() == planned(experiment_file, nodes).to_json()


def test_port_and_address_of_the_file_are_kept(experiment_file):
    overrides = ("+experiment.runner.master_port=29400", "+experiment.runner.master_addr=10.9.9.9")
    made = planned(experiment_file, [node("a"), node("b")], *overrides)
    assert made.ports == {"rendezvous": 29400}
    assert "--master-addr=10.9.9.9" in made.processes[0].argv


def test_environment_of_the_node_wins_over_its_type_and_that_over_the_common_one(experiment_file):
    made = planned(
        experiment_file,
        [node("a", kind="X"), node("b", kind="X"), node("c", kind="Y"), node("d", kind="Y")],
        "+experiment.envs.V=common",
        "+experiment.envs.device_type_specific={X: {V: typed, API_KEY: s3cret-value}}",
        "+experiment.envs.node_specific={b: {V: own}}",
    )
    assert [process.env["V"] for process in made.processes] == ["typed", "own", "common", "common"]
    assert "s3cret" not in made.to_json()


def test_a_text_of_the_user_is_no_placeholder(experiment_file):
    made = planned(experiment_file, [node("a"), node("b")], "+experiment.envs.V='{port:x} {run_dir}'")
    assert made.processes[0].env["V"] == "{{port:x}} {{run_dir}}"


@pytest.mark.parametrize(
    ("nodes", "overrides", "said"),
    [
        ([node("a", slots=8), node("b", slots=4)], (), "a takes 8 processes.*nproc_per_node=4"),
        ([node("a", slots=16), node("b", slots=16)], (), "slots: 16: .* offers 8"),
        ([node("a"), node("b", chip="ascend")], (), "b has ascend: all hosts must have the same kind"),
        ([node("a"), node("b")], ("train.model.global_batch_size=24",), "global_batch_size: 24"),
    ],
)
def test_hosts_that_do_not_fit_are_refused(experiment_file, nodes, overrides, said):
    with pytest.raises(InvalidInput, match=said):
        planned(experiment_file, nodes, *overrides)


def hostfile(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    return f"+experiment.runner.hostfile={tmp_path}/hosts"


def test_the_hostfile_says_which_hosts_and_nnodes_how_many(experiment_file, tmp_path):
    file = hostfile(tmp_path, "192.0.2.1 slots=8\nlocalhost slots=8\n192.0.2.3 slots=8\n")

    def names(*overrides):
        experiment = load(experiment_file, [file, *overrides], task="train")
        return [(target.name, target.transport) for target, _ in targets_of(experiment)]

    assert names() == [("192.0.2.1", "ssh"), ("localhost", "local"), ("192.0.2.3", "ssh")]
    assert len(names("+experiment.runner.nnodes=2")) == 2
    assert len(names("+experiment.runner.nnodes='1:2'")) == 2
    with pytest.raises(InvalidInput, match="has 3 hosts"):
        names("+experiment.runner.nnodes=4")


@pytest.mark.parametrize(
    ("text", "said"), [(None, "No such file"), ("a slots=8 tpye=x\n", "hosts:1: 'tpye': unknown word")]
)
def test_a_hostfile_that_is_missing_or_wrong_ends_the_run(experiment_file, tmp_path, capsys, text, said):
    file = hostfile(tmp_path, text or "")
    if text is None:
        (tmp_path / "hosts").unlink()
    assert main(["run", str(experiment_file), file]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "exp" / "runs").exists()


NODES = (
    "+experiment.runner.nnodes=2",
    "experiment.runner.nproc_per_node=4",
    "train.model.global_batch_size=64",
)


def printed(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


@pytest.fixture
def _installed(monkeypatch):
    """Let the quick tests plan: torch and megatron-core need not be here."""
    monkeypatch.setattr("flagscale_train.runs.examine", lambda experiment: Findings())


@pytest.mark.usefixtures("_installed")
def test_the_same_plan_prints_for_other_launchers(experiment_file, tmp_path, capsys):
    script = printed(
        capsys,
        "plan",
        "--as",
        "slurm",
        "--chip",
        "nvidia",
        "--slurm",
        "partition=long",
        experiment_file,
        *NODES,
    )
    assert "#SBATCH --nodes=2\n" in script
    assert "#SBATCH --partition=long\n" in script
    assert "--nproc-per-node=4" in script
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)
    pods = ("--chip", "nvidia", "--image", "i:1", "--claim", "c=/exp")
    text = printed(capsys, "plan", "--as", "jobset", *pods, experiment_file, *NODES)
    assert "nvidia.com/gpu: 4" in text
    assert 'kind: "LeaderWorkerSet"' in printed(
        capsys, "plan", "--as", "lws", "--chip", "nvidia", "--image", "i:1", experiment_file, *NODES
    )


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--as", "jobset", "--chip", "nvidia"), "--image: not given"),
        (("--as", "slurm", "--chip", "nvidai"), "nvidai"),
        (
            ("--as", "slurm", "--chip", "nvidia", "--slurm", "nodes=3"),
            "slurm option nodes: the plan decides it",
        ),
    ],
)
def test_what_other_launchers_need_is_asked_for(experiment_file, capsys, words, said):
    assert main(["plan", *words, str(experiment_file), *NODES]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("_installed")
def test_without_slurm_the_user_is_told_where_to_go(experiment_file, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["run", "--on", "slurm", "--chip", "cpu", str(experiment_file), *NODES]) == 4
    assert "sbatch: not found" in capsys.readouterr().err


def test_a_failure_of_any_host_is_known_as_the_trainings_own():
    assert _OWN_FAILURE.match("10.0.0.2: train-1: exited with code 1: x")
    assert _OWN_FAILURE.match("train: exited with code 1")
    assert not _OWN_FAILURE.match("10.0.0.2: connection lost: x")


def test_status_folds_the_events_of_all_hosts_and_exits_4_after_a_failure(tmp_path, monkeypatch, capsys):
    names = ("n0", "n1")
    event = '{"event": "step", "iteration": %d, "time": %d, "loss": 1.0}'
    codes = [f"echo '{event % pair}' > events.jsonl; " for pair in ((1, 10), (2, 20))]
    codes = [codes[0] + "sleep 60", codes[1] + "exit 7"]
    made = hw.Plan(
        kind="train",
        name="two",
        targets=tuple(hw.Target(name=name, transport="local", address="127.0.0.1") for name in names),
        processes=tuple(
            hw.Process(name=f"train-{rank}", rank=rank, host=names[rank], argv=("sh", "-c", codes[rank]))
            for rank in (0, 1)
        ),
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = hw.launch(made, tmp_path / "run")
    run.wait(60)
    now = status(run)
    assert now.progress.iteration == 2
    assert now.what_happened == "n1: train-1: exited with code 7"
    assert main(["status", "--json", str(run.dir)]) == 4
    assert json.loads(capsys.readouterr().out)["state"] == "failed"
    assert main(["status", str(run.dir)]) == 4
    assert "train-1: pid" in capsys.readouterr().out
