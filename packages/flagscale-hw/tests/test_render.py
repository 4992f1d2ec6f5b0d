"""Plans as scripts: equal to golden files, run by bash. FLAGSCALE_UPDATE_GOLDEN=1 rewrites those."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale_hw import (
    File,
    InputError,
    Plan,
    Pods,
    Process,
    StopPolicy,
    Target,
    literal,
    render_kubernetes,
    render_scripts,
    render_slurm,
)
from flagscale_hw.kubernetes import to_yaml
from flagscale_hw.placeholders import substitute
from flagscale_hw.scripts import quote

GOLDEN = Path(__file__).parent / "golden"
PLACES = {"run_dir": "/r", "node_rank": "1", "own_address": "10.0.0.2"}


def plan(**changes):
    made = {
        "kind": "train",
        "name": "Qwen 3, tiny",
        "targets": tuple(Target(name=f"node-{rank}", address=f"10.0.0.{rank + 1}") for rank in range(3)),
        "processes": tuple(
            Process(
                name=f"train-{rank}",
                rank=rank,
                host=f"node-{rank}",
                cwd="/work dir",
                env={"A": "it's $HOME", "EVENTS": "{run_dir}/events", "TOKEN": "s3cret-value"},
                argv=(
                    *("python3", "-m", "torch.distributed.run", "--node-rank={node_rank}"),
                    *("--master-addr={address:node-0}", "--master-port={port:rendezvous}"),
                    *("--local-addr={own_address}", '--json={"a": "$(x)"}', "{{run_dir}}"),
                ),
            )
            for rank in range(3)
        ),
        "files": (File(path="conf/a.txt", text="port: {port:rendezvous}\n'quoted'\n"),),
        "ports": {"rendezvous": None, "web": 8000},
        "stop": StopPolicy(signal="SIGINT", grace_s=45.0),
        "secrets": ("TOKEN",),
        **changes,
    }
    return Plan(**made)


PODS = Pods(
    image="registry.example/train:1",
    namespace="team",
    resources={"nvidia.com/gpu": 8},
    claims={"experiments": "/exp"},
    secret="tokens",
)
RENDERED = {
    "slurm.sh": lambda: render_slurm(
        plan(), "/exp/runs/1", {"partition": "long", "time": "2:00:00", "exclusive": None}
    ),
    "jobset.yaml": lambda: render_kubernetes(plan(), "jobset", PODS),
    "lws.yaml": lambda: render_kubernetes(plan(), "lws", PODS),
    "node-1.sh": lambda: render_scripts(plan())["node-1.sh"],
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_plan_renders_as_recorded(name):
    text = RENDERED[name]()
    path = GOLDEN / name
    if os.environ.get("FLAGSCALE_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert "s3cret" not in text


@pytest.mark.parametrize("name", ["slurm.sh", "node-1.sh"])
def test_bash_reads_the_script(name, tmp_path):
    script = tmp_path / name
    script.write_text(RENDERED[name]())
    subprocess.run(["bash", "-n", script], check=True)


def run_node(script, run_dir, **env):
    path = run_dir.with_suffix(".sh")
    path.write_text(script)
    return subprocess.run(
        ["bash", path], env={**os.environ, "FLAGSCALE_RUN_DIR": str(run_dir), **env}, check=False, timeout=60
    )


def shells(*codes, **rest):
    processes = tuple(
        Process(name=f"p-{number}", argv=("sh", "-c", code)) for number, code in enumerate(codes)
    )
    return render_scripts(Plan(kind="t", name="t", processes=processes, **rest))["node-0.sh"]


def test_a_script_runs_as_the_plan_says(tmp_path):
    target = Target(name="n", address="10.0.0.9")
    words = (
        "printf",
        "%s|",
        "it's",
        "$HOME",
        "{node_rank}",
        "{own_address}",
        "{port:r}",
        "{{run_dir}}",
        "ü\n",
    )
    made = Plan(
        kind="t",
        name="t",
        targets=(target,),
        processes=(Process(name="p-0", rank=0, host="n", argv=words),),
        ports={"r": None},
    )
    done = run_node(render_scripts(made)["node-0.sh"], tmp_path / "run", FLAGSCALE_PORT_R="1234")
    assert done.returncode == 0
    assert (tmp_path / "run/logs/p-0.log").read_text() == "it's|$HOME|0|10.0.0.9|1234|{run_dir}|ü\n|"
    assert (tmp_path / "run/ends/p-0").read_text().split()[0] == "0"


def test_the_first_process_that_fails_ends_the_others_and_gives_the_exit_code(tmp_path):
    assert run_node(shells("exit 5", "sleep 600"), tmp_path / "run").returncode == 5
    assert (tmp_path / "run/ends/p-1").read_text().split()[0] == "143"


@pytest.mark.parametrize(("is_service", "code"), [(False, 0), (True, 1)])
def test_a_service_that_ends_well_has_failed(tmp_path, is_service, code):
    wait = f"until [ -e {tmp_path}/run/ends/a ]; do sleep 0.05; done"  # until the end of the other is seen
    codes = {"a": "exit 0", "b": f"{wait}; exec sleep 600" if is_service else f"{wait}; exit 0"}
    processes = tuple(
        Process(name=name, argv=("sh", "-c", text), is_service=is_service) for name, text in codes.items()
    )
    script = render_scripts(Plan(kind="t", name="t", processes=processes))["node-0.sh"]
    assert run_node(script, tmp_path / "run").returncode == code
    ends = {name: (tmp_path / f"run/ends/{name}").read_text().split()[0] for name in codes}
    assert ends == {"a": "0", "b": "143" if is_service else "0"}


def test_a_service_may_end_well_when_it_is_asked_to(tmp_path, monkeypatch):
    """Also while its start is written down, which takes long here, and before the next one starts."""
    for name in ("date", "uname"):
        (tmp_path / name).write_text(f'#!/bin/sh\nsleep 1\nexec {shutil.which(name)} "$@"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FLAGSCALE_RUN_DIR", str(tmp_path / "run"))
    text = f"trap 'exit 0' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    processes = tuple(Process(name=name, argv=("sh", "-c", text), is_service=name == "a") for name in "ab")
    path = tmp_path / "node.sh"
    path.write_text(render_scripts(Plan(kind="t", name="t", processes=processes))["node-0.sh"])
    node = subprocess.Popen(["bash", path])
    while not (tmp_path / "up").exists():
        assert node.poll() is None
        time.sleep(0.02)
    node.terminate()
    node.wait(60)
    ends = {one: (tmp_path / f"run/ends/{one}").read_text().split()[0] for one in "ab"}
    assert (ends["a"], ends["b"] in ("0", "143")) == (
        "0",
        True,
    )  # the other may be hit before its trap is set
    assert node.returncode == int(ends["b"])


def test_a_secret_must_be_in_the_environment(tmp_path):
    made = Plan(
        kind="t",
        name="t",
        processes=(Process(name="p", argv=("sh", "-c", 'echo "$KEY"'), env={"KEY": "s3cret"}),),
        secrets=("KEY",),
    )
    script = render_scripts(made)["node-0.sh"]
    assert "s3cret" not in script
    assert run_node(script, tmp_path / "none").returncode != 0
    assert run_node(script, tmp_path / "some", KEY="given").returncode == 0
    assert (tmp_path / "some/logs/p.log").read_text() == "given\n"


def test_equal_nodes_share_their_text_and_others_do_not():
    assert render_slurm(plan(), "/r").count("exec python3") == 1
    odd = plan().processes
    odd = (*odd[:2], Process(name="train-2", rank=2, host="node-2", argv=("python3", "other")))
    text = render_slurm(plan(processes=odd), "/r")
    assert "\n0|1)\n" in text
    assert "\n2)\n" in text


@pytest.mark.parametrize("options", [{"nodes": "3"}, {"-p": "x"}, {"partition": "a\nb"}, {"a b": None}])
def test_options_of_slurm_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match="slurm option"):
        render_slurm(plan(), "/r", options)


def test_a_claim_needs_an_absolute_path():
    with pytest.raises(InputError, match="absolute"):
        render_kubernetes(plan(), "jobset", Pods(image="x", claims={"a": "b"}))


TEXTS = st.text(alphabet=st.characters(exclude_characters="\0\r", exclude_categories=("Cs",)), max_size=40)


@given(st.lists(TEXTS, min_size=1, max_size=30))
@settings(max_examples=20, deadline=None)  # each example is a bash
def test_no_text_is_ever_interpreted_by_the_shell(texts):
    words = " ".join(quote(literal(text), {}) for text in texts)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == texts


@settings(deadline=None)
@given(st.text(alphabet="{}:abnode_rankrun_dirport own_address", max_size=60))
def test_an_escaped_text_comes_back_as_it_was(text):
    assert substitute(literal(text), lambda kind, name: "WRONG") == text
    twice = substitute(literal(text), lambda kind, name: "WRONG", is_last=False)
    assert substitute(twice, lambda kind, name: "WRONG") == text


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.from_regex(r"k[a-z]{1,8}", fullmatch=True), PLAIN, min_size=1, max_size=4))
def test_what_is_written_as_yaml_is_read_as_the_same(data):
    yaml = pytest.importorskip("yaml", reason="flagscale-hw itself needs no YAML reader")
    assert json.dumps(yaml.safe_load(to_yaml(data))) == json.dumps(data)


def test_shlex_agrees_on_plain_words():
    assert shlex.split(quote("a b", {})) == ["a b"]
