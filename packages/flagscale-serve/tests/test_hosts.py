"""Plans over several hosts, all of them faked: one instance on many hosts, copies, prefill apart from decode.

`FLAGSCALE_UPDATE_GOLDEN=1 pytest test_hosts.py` writes the golden files anew; read what has changed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from unittest import mock

import pytest

from flagscale_config import load
from flagscale_hw import File, Node, Plan, Process, Target, launch, render_scripts
from flagscale_hw.cause import is_consequence
from flagscale_hw.testing import fake_host
from flagscale_serve import EngineMissing, InvalidService, plan, router
from flagscale_serve.checks import check_engines, check_router
from flagscale_serve.hosts import check_routers, promised_nodes, targets_of
from flagscale_serve.service import of_experiment

GOLDEN = Path(__file__).parent / "golden"
HOSTS = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
NVIDIA = fake_host("nvidia", 8)


def nodes(count: int = 2, chip: str = "nvidia", devices: int = 8, **more) -> tuple[Node, ...]:
    machine = fake_host(chip, devices)
    return tuple(
        Node(target=Target(name=name), machine=machine, slots=devices, interface="eth1", **more)
        for name in HOSTS[:count]
    )


def check_golden(name: str, made) -> None:
    data = json.loads(made.to_json())
    data["files"] = [file["path"] for file in data["files"]]
    for one in data["facts"]["instances"]:
        one["options"] = [[row["option"], row["value"], row["source"]] for row in one["options"]]
    data["facts"]["source"] = Path(data["facts"]["source"]).name
    for process in data["processes"]:
        process["cwd"] = "."
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    path = GOLDEN / name
    if os.environ.get("FLAGSCALE_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text()


def served(serve_file, args: str, experiment: str = "", more: str = "", engine: str = "vllm"):
    path = serve_file(
        f"- serve_id: a\n  engine: {engine}\n  engine_args: {{model: /m, {args}}}\n{more}",
        experiment=experiment,
    )
    return load(path)


def words(process) -> str:
    return " ".join(process.argv)


def test_tensor_parallelism_over_hosts_is_vllms_own(serve_file):
    made = plan(served(serve_file, "tensor_parallel_size: 16"), NVIDIA, nodes=nodes(), python="py")
    head, other = made.processes
    assert (head.name, head.host, head.rank) == ("a", "10.0.0.1", 0)
    assert (other.name, other.host, other.rank) == ("a-rank-1", "10.0.0.2", 1)
    ranks = "--master-addr {address:10.0.0.1} --master-port {port:a-ranks}"
    assert ranks in words(head)
    assert ranks in words(other)
    assert "--nnodes 2" in words(head)
    assert "--node-rank 0" in words(head)
    assert "--node-rank 1" in words(other)
    assert "--headless" in words(other)
    assert "--headless" not in words(head)
    assert "--port" not in other.argv
    assert words(other).startswith("py {run_dir}/leave_last.py {address:10.0.0.1} {port:a} py -m vllm.")
    assert "leave_last.py" not in words(head)
    assert made.port_hosts["a-ranks"] == "10.0.0.1"
    (probe,) = made.probes
    assert probe.url == "http://{address:10.0.0.1}:{port:a}/v1/completions"
    assert head.env["VLLM_HOST_IP"] == "{own_address}"
    assert head.env["GLOO_SOCKET_IFNAME"] == "eth1"
    assert "CUDA_VISIBLE_DEVICES" not in head.env
    check_golden("hosts-tensor-16.json", made)


def test_the_stages_of_a_pipeline_lie_on_different_hosts(serve_file):
    experiment = served(serve_file, "tensor_parallel_size: 8, pipeline_parallel_size: 2")
    made = plan(experiment, NVIDIA, nodes=nodes(3), python="py")
    assert [process.host for process in made.processes] == ["10.0.0.1", "10.0.0.2"]
    assert [target.name for target in made.targets] == ["10.0.0.1", "10.0.0.2"]


def test_copies_by_data_parallelism_are_counted_on_each_host(serve_file):
    experiment = served(serve_file, "tensor_parallel_size: 4, data_parallel_size: 4")
    head, other = plan(experiment, NVIDIA, nodes=nodes(), python="py").processes
    assert "--data-parallel-size-local 2" in words(head)
    assert "--data-parallel-address {address:10.0.0.1}" in words(other)
    assert "--data-parallel-rpc-port {port:a-ranks}" in words(other)
    assert "--data-parallel-start-rank 2" in words(other)
    assert "--data-parallel-start-rank" not in words(head)
    assert "--headless" in words(other)
    assert "--nnodes" not in words(head)


FOUR_HOSTS = nodes(2) + tuple(
    Node(target=Target(name=f"10.0.1.{n}"), machine=NVIDIA, slots=8, interface="eth1") for n in (1, 2)
)


@pytest.mark.parametrize(
    ("args", "devices", "per_host"),
    [
        ("tensor_parallel_size: 2, data_parallel_size: 4", 8, [4]),
        ("tensor_parallel_size: 2, data_parallel_size: 4, data_parallel_size_local: 4", 8, [4]),
        ("tensor_parallel_size: 2, data_parallel_size: 4, data_parallel_size_local: 2", 8, [2, 2]),
        ("tensor_parallel_size: 2, data_parallel_size: 4, data_parallel_size_local: 1", 8, [1, 1, 1, 1]),
        ("tensor_parallel_size: 2, pipeline_parallel_size: 2, data_parallel_size: 6", 8, [2, 2, 2]),
        # Two hosts would have room for six devices, three each, but a copy would lie on both.
        ("tensor_parallel_size: 2, data_parallel_size: 3", 4, [1, 1, 1]),
    ],
)
def test_every_host_gets_whole_copies_and_its_own_ranks(serve_file, args, devices, per_host):
    hosts = tuple(replace(node, slots=devices) for node in FOUR_HOSTS)
    made = plan(served(serve_file, args), NVIDIA, nodes=hosts, python="py")
    assert [process.host for process in made.processes] == [
        node.target.name for node in hosts[: len(per_host)]
    ]
    start = 0
    for rank, (process, copies) in enumerate(zip(made.processes, per_host, strict=True)):
        if len(per_host) > 1:
            assert f"--data-parallel-size-local {copies}" in words(process)
        assert ("--headless" in process.argv) == (rank > 0)
        assert ("--port" in process.argv) == (rank == 0)
        assert (f"--data-parallel-start-rank {start}" in words(process)) == (rank > 0)
        start += copies


def test_where_copies_meet_is_the_files_port_and_leased_on_the_first_host(serve_file):
    args = "data_parallel_size: 16, data_parallel_rpc_port: 13345, api_server_count: 4"
    made = plan(served(serve_file, args), NVIDIA, nodes=nodes(), python="py")
    assert (made.ports["a-ranks"], made.port_hosts["a-ranks"]) == (13345, "10.0.0.1")
    head, other = made.processes
    for process in (head, other):
        assert words(process).count("--data-parallel-rpc-port") == 1
        assert "--data-parallel-rpc-port {port:a-ranks}" in words(process)
    # Only the first host has servers, and vLLM refuses the word on the others.
    assert "--api-server-count 4" in words(head)
    assert "--api-server-count" not in other.argv
    check_golden("hosts-data-16.json", made)


def test_two_ports_for_the_same_thing_are_refused(serve_file):
    args = "data_parallel_size: 16, data_parallel_rpc_port: 13345"
    with pytest.raises(InvalidService, match=r"data_parallel_rpc_port: 13345: contradicts .*port: 29777"):
        plan(served(serve_file, args, "runner: {master_port: 29777}"), NVIDIA, nodes=nodes())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("tensor_parallel_size: 16, data_parallel_size: 2", "resources.num_replicas: 2 instead"),
        ("data_parallel_size: 30, data_parallel_size_local: 8", "30 devices asked for, 8 on each host"),
        ("data_parallel_size: 6, data_parallel_size_local: 1", "6 devices asked for, 1 on each host"),
        ("tensor_parallel_size: 3, data_parallel_size: 11", "33 devices asked for for copies of 3"),
        ("data_parallel_size: 4, data_parallel_size_local: 0", "data_parallel_size_local: 0: a whole number"),
        ("data_parallel_size: 16, headless: true", "headless: True: one command starts all hosts"),
        ("data_parallel_size: 16, data_parallel_start_rank: 8", "data_parallel_start_rank: 8: one command"),
        ("data_parallel_size: 16, data_parallel_address: 10.0.0.1", "data_parallel_address: '10.0.0.1': one"),
        ("tensor_parallel_size: 16, nnodes: 2, node_rank: 0", "nnodes: 2: one command starts all hosts"),
        ("data_parallel_size: 16, data_parallel_size_local: 8, data_parallel_hybrid_lb: true", "one address"),
    ],
)
def test_data_parallelism_that_hosts_cannot_share_is_refused(serve_file, args, said):
    with pytest.raises(InvalidService, match=said):
        plan(served(serve_file, args), NVIDIA, nodes=FOUR_HOSTS)


def test_what_only_one_rank_can_be_told_is_refused_per_host_too(serve_file):
    more = "node_args: {10.0.0.2: {engine_args: {data_parallel_start_rank: 8}}}"
    with pytest.raises(InvalidService, match="data_parallel_start_rank: 8: one command starts all hosts"):
        plan(served(serve_file, "data_parallel_size: 16", more), NVIDIA, nodes=nodes())


def test_a_part_of_the_copies_needs_hosts(serve_file):
    args = "data_parallel_size: 8, data_parallel_size_local: 4"
    with pytest.raises(InvalidService, match="this is one host: name the hosts in"):
        plan(served(serve_file, args), NVIDIA)
    alone = plan(served(serve_file, "data_parallel_size: 8, data_parallel_size_local: 8"), NVIDIA)
    assert "--data-parallel-size-local" not in alone.processes[0].argv


@pytest.mark.parametrize("key", ["data_parallel_backend", "distributed_executor_backend"])
def test_ray_spreads_the_copies(serve_file, key):
    args = f"tensor_parallel_size: 4, data_parallel_size: 4, {key}: ray"
    made = plan(served(serve_file, args), NVIDIA, nodes=nodes(), python="py")
    assert [process.name for process in made.processes] == ["a-ray", "a", "a-rank-1-ray"]
    engine = made.processes[1]
    assert "--data-parallel-backend ray" in words(engine)
    assert "--data-parallel-size-local 2" in words(engine)
    assert "--data-parallel-start-rank" not in engine.argv
    assert "VLLM_RAY_DP_PACK_STRATEGY" not in engine.env


def test_ray_lets_a_copy_span_hosts(serve_file):
    args = "tensor_parallel_size: 16, data_parallel_size: 2, data_parallel_backend: ray"
    made = plan(served(serve_file, args), NVIDIA, nodes=FOUR_HOSTS, python="py")
    assert len(made.processes) == 5
    engine = made.processes[1]
    assert words(engine).startswith("py {run_dir}/ray_launch.py 4 ")
    assert engine.env["VLLM_RAY_DP_PACK_STRATEGY"] == "span"
    assert "--data-parallel-backend ray" in words(engine)
    assert "--data-parallel-size-local" not in engine.argv


def test_ray_where_the_file_asks_for_it(serve_file):
    args = "tensor_parallel_size: 16, distributed_executor_backend: ray"
    made = plan(served(serve_file, args), NVIDIA, nodes=nodes(), python="py")
    assert [process.name for process in made.processes] == ["a-ray", "a", "a-rank-1-ray"]
    ray, engine, other = made.processes
    start = "py {run_dir}/leave_last.py {address:10.0.0.1} {port:a} py -m ray.scripts.scripts start --block "
    assert words(ray).startswith(f"{start}--head --port {{port:a-ranks}}")
    assert words(other).startswith(start)
    assert "--address {address:10.0.0.1}:{port:a-ranks}" in words(other)
    assert "--num-gpus 8" in words(other)
    assert words(engine).startswith("py {run_dir}/ray_launch.py 2 py -m vllm.entrypoints.cli.main serve /m")
    assert engine.env["RAY_ADDRESS"] == "{address:10.0.0.1}:{port:a-ranks}"
    assert "--nnodes" not in engine.argv
    check_golden("hosts-ray.json", made)


def test_the_engine_waits_for_rays_last_host(tmp_path):
    """The launcher runs in the engine's Python, so it is run here beside a stand-in for Ray."""
    (tmp_path / "ray.py").write_text(
        "import pathlib\ncount = pathlib.Path(__file__).with_name('count')\n"
        "def init(address, log_to_driver):\n"
        "    seen = int(count.read_text() or 0) if count.exists() else 0\n"
        "    count.write_text(str(seen + 1))\n"
        "    if seen == 0: raise ConnectionError(address)\n"
        "def nodes(): return [{'Alive': True}] * int(count.read_text()) + [{'Alive': False}]\n"
        "def shutdown(): pass\n"
    )
    script = tmp_path / "launch.py"
    script.write_text(files("flagscale_serve.engines").joinpath("ray_launch.py").read_text())
    done = subprocess.run(
        [sys.executable, script, "3", sys.executable, "-c", "print('engine')"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "RAY_ADDRESS": "head:1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "Ray has 0 of 3 hosts",
        "Ray has 2 of 3 hosts",
        "Ray has 3 of 3 hosts",
        "engine",
    ]


@pytest.fixture
def door():
    """Something that listens, as the first rank does while it answers what is under way."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def last(tmp_path):
    """Start a command that leaves last, and end it whatever happens."""
    script = tmp_path / "leave_last.py"
    script.write_text(files("flagscale_serve.engines").joinpath("leave_last.py").read_text())
    started = []

    def start(door, code: str) -> subprocess.Popen[str]:
        where = ("127.0.0.1", str(door.getsockname()[1]))
        # The command ends with its input, should the test fail.
        argv = [sys.executable, str(script), *where, sys.executable, "-uc", code]
        started.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def test_what_works_for_the_first_rank_leaves_after_it(door, last):
    waiting = last(door, "import sys; print('up'); sys.stdin.read()")
    assert waiting.stdout.readline() == "up\n"
    waiting.terminate()
    door.settimeout(60)
    for _ in range(2):  # it looks again and again whether the first rank is there, and stays
        door.accept()[0].close()
        assert waiting.poll() is None
    door.close()
    assert waiting.wait(60) == -signal.SIGTERM


def test_what_works_for_a_first_rank_that_is_gone_ends(door, last):
    left = last(door, "import sys; sys.stdin.read()")
    door.settimeout(60)
    door.accept()[0].close()
    door.close()
    assert left.wait(60) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("code", "ends"), [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)]
)
def test_what_leaves_by_itself_ends_as_it_did(door, last, code, ends):
    assert last(door, code).wait(60) == ends


@pytest.mark.parametrize("first_is_gone", [False, True])
def test_a_rank_that_ends_softly_has_failed_as_the_echo_of_another(tmp_path, door, first_is_gone):
    """It left with 0, or was ended because the first rank is gone: the run has failed, for another reason."""
    code = "import sys; sys.stdin.read()" if not first_is_gone else "import time; time.sleep(600)"
    where = ("127.0.0.1", str(door.getsockname()[1]))
    text = files("flagscale_serve.engines").joinpath("leave_last.py").read_text()
    argv = (sys.executable, "{run_dir}/leave_last.py", *where, sys.executable, "-uc", code)
    made = Plan(
        kind="serve",
        name="ranks",
        processes=(Process(name="rank", argv=argv, is_service=True),),
        files=(File(path="leave_last.py", text=text),),
    )
    run = launch(made, tmp_path / "run", detach=False)
    try:
        door.settimeout(60)
        if first_is_gone:
            door.accept()[0].close()
            door.close()
        now = run.wait(60)
    finally:
        run.stop(0.0)
    assert now.state == "failed"
    assert is_consequence(now.reason), now.reason


def test_ray_is_refused_on_cpus(serve_file):
    args = "tensor_parallel_size: 2, distributed_executor_backend: ray"
    with pytest.raises(InvalidService, match="vLLM does not use Ray on CPUs"):
        plan(served(serve_file, args), fake_host("cpu"), nodes=nodes(chip="cpu", devices=0))


def on_cpus(*slots: int | None) -> tuple[Node, ...]:
    machine = fake_host("cpu")
    return tuple(
        Node(target=Target(name=name), machine=machine, slots=number)
        for name, number in zip(HOSTS, slots, strict=False)
    )


@pytest.mark.parametrize(
    ("size", "slots", "hosts"),
    [
        (1, (None, None), ["10.0.0.1"]),
        (2, (None, None), ["10.0.0.1", "10.0.0.2"]),
        (2, (2, 2), ["10.0.0.1"]),
        (4, (2, 2), ["10.0.0.1", "10.0.0.2"]),
        (4, (1, 2, 2), ["10.0.0.2", "10.0.0.3"]),
    ],
)
def test_each_slot_of_a_cpu_takes_one_process(serve_file, size, slots, hosts):
    made = plan(served(serve_file, f"tensor_parallel_size: {size}"), fake_host("cpu"), nodes=on_cpus(*slots))
    assert [process.host for process in made.processes] == hosts
    # What each of them gets of its host is shared by its processes.
    whole = plan(served(serve_file, ""), fake_host("cpu"), nodes=on_cpus(None)).processes[0]
    mine = size // len(hosts)
    for process in made.processes:
        assert int(process.env["OMP_NUM_THREADS"]) == max(1, int(whole.env["OMP_NUM_THREADS"]) // mine)
        assert abs(cache_of(process) - cache_of(whole) / mine) < 1 << 20


def cache_of(process) -> int:
    return int(process.argv[process.argv.index("--kv-cache-memory-bytes") + 1])


def test_cpus_without_slots_for_all_are_refused(serve_file):
    with pytest.raises(InvalidService, match=r"4 devices asked for: the hosts have 10.0.0.1 1, 10.0.0.2 1"):
        plan(served(serve_file, "tensor_parallel_size: 4"), fake_host("cpu"), nodes=on_cpus(None, None))


def test_a_host_without_accelerators_among_others_gets_nothing(serve_file):
    mixed = (*on_cpus(None), *nodes(2)[1:])
    made = plan(served(serve_file, "tensor_parallel_size: 8"), NVIDIA, nodes=mixed)
    assert [process.host for process in made.processes] == ["10.0.0.2"]


def test_sglang_meets_at_the_head(serve_file):
    experiment = served(serve_file, "tensor_parallel_size: 16", engine="sglang")
    head, other = plan(experiment, NVIDIA, nodes=nodes(), python="py").processes
    for rank, process in enumerate((head, other)):
        assert f"--node-rank {rank}" in words(process)
        assert "--dist-init-addr {address:10.0.0.1}:{port:a-ranks}" in words(process)
        assert "--nnodes 2" in words(process)


SGLANG = "  engine_args_specific: {sglang: {%s}}\n"


@pytest.mark.parametrize("words", ["attn_dp_size: 16", "dp_size: 16, enable_dp_attention: true"])
def test_sglang_shares_attention_over_hosts(serve_file, words):
    """Attention in data parallel takes no devices of its own: it shares those of tensors."""
    file = served(serve_file, "tensor_parallel_size: 16", engine="sglang", more=SGLANG % words)
    head, other = plan(file, NVIDIA, nodes=nodes(4), python="py").processes
    for rank, process in enumerate((head, other)):
        assert f"--node-rank {rank}" in " ".join(process.argv)
        assert "--nnodes 2" in " ".join(process.argv)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("dp_size: 2", "SGLang keeps copies on one host: on 4 hosts set .*attn_dp_size"),
        ("attn_dp_size: 3", "attn_dp_size: 3: must divide tensor_parallel_size 16"),
        ("dp_size: 5, enable_dp_attention: true", "attn_dp_size: 5: must divide tensor_parallel_size 16"),
        ("nnodes: 2", "nnodes: 2: one command starts all hosts"),
        ("node_rank: 1", "node_rank: 1: one command starts all hosts"),
    ],
)
def test_what_sglang_cannot_share_over_hosts_is_refused(serve_file, words, said):
    file = served(serve_file, "tensor_parallel_size: 16", engine="sglang", more=SGLANG % words)
    with pytest.raises(InvalidService, match=said):
        plan(file, NVIDIA, nodes=FOUR_HOSTS)


def test_instances_fill_the_hosts_in_order(serve_file):
    more = "- serve_id: b\n  engine_args: {model: /b, tensor_parallel_size: 4}\n"
    more += "- serve_id: c\n  engine_args: {model: /c, tensor_parallel_size: 8}\n"
    made = plan(served(serve_file, "tensor_parallel_size: 2", more=more), NVIDIA, nodes=nodes())
    assert [(p.name, p.host, p.env.get("CUDA_VISIBLE_DEVICES")) for p in made.processes] == [
        ("a", "10.0.0.1", "0,1"),
        ("b", "10.0.0.1", "2,3,4,5"),
        ("c", "10.0.0.2", None),
    ]


def test_too_many_devices_for_the_hosts(serve_file):
    with pytest.raises(InvalidService, match=r"32 devices asked for: the hosts have 10.0.0.1 8, 10.0.0.2 8"):
        plan(served(serve_file, "tensor_parallel_size: 32"), NVIDIA, nodes=nodes())


def test_variables_and_options_of_single_hosts(serve_file):
    experiment = served(
        serve_file,
        "tensor_parallel_size: 16, max_num_seqs: 8",
        """
        envs:
          COMMON: 1
          device_type_specific: {A800: {COMMON: 2, TYPED: a}}
          nodes_envs:
            10.0.0.2: {COMMON: 3, NCCL_SOCKET_IFNAME: ib0}
        node_args:
          10.0.0.2: {engine_args: {max_num_seqs: 16}}
        """,
    )
    head, other = plan(experiment, NVIDIA, nodes=nodes(type="A800")).processes
    assert (head.env["COMMON"], head.env["TYPED"]) == ("2", "a")
    assert (other.env["COMMON"], other.env["NCCL_SOCKET_IFNAME"]) == ("3", "ib0")
    assert "--max-num-seqs 8" in words(head)
    assert "--max-num-seqs 16" in words(other)


DISAGGREGATED = """
runner:
  deploy:
    prefill_decode_disaggregation: true
    prefill_num: 2
    decode_num: 1
    prefill_decode_strategy: random
    port: 9000
"""


PAIR = "runner: {deploy: {prefill_decode_disaggregation: true}}"


UNUSED = """\
    prefill_decode_log_dir: /logs
    pd_proxy_port: 30001
"""


def kv_config(process) -> dict:
    return json.loads(process.argv[process.argv.index("--kv-transfer-config") + 1])


def test_prefill_and_decode_on_one_host(serve_file):
    experiment = served(serve_file, "served_model_name: m", DISAGGREGATED)
    made = plan(experiment, NVIDIA, python="py", router_python="router-py")
    assert [(one.name, one.env.get("CUDA_VISIBLE_DEVICES")) for one in made.processes] == [
        ("a-prefill-1", "0"),
        ("a-prefill-2", "1"),
        ("a-decode-1", "2"),
        ("a-router-prefill", None),
        ("a-router", None),
    ]
    first, _, decode, prefills, router = made.processes
    assert kv_config(first) == {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}
    assert kv_config(decode) == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "recompute",
    }
    assert first.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "{port:a-prefill-1-kv-0}"
    assert words(router).startswith("router-py -m vllm_router.launch_router --host 127.0.0.1 --port")
    # The router that parts the work tries nothing twice: the two prefills have one before them that does.
    assert "--policy random" in words(prefills)
    both = "--worker-urls http://127.0.0.1:{port:a-prefill-1} http://127.0.0.1:{port:a-prefill-2}"
    assert words(prefills).endswith(both)
    assert words(router).endswith(
        "--prefill http://127.0.0.1:{port:a-router-prefill} --decode http://127.0.0.1:{port:a-decode-1}"
    )
    assert (made.ports["a-router"], made.ports["a-router-prefill"]) == (9000, None)
    # Each half generates a token by itself; the router's tells something of a half that is the only one.
    halves = ["a-prefill-1", "a-prefill-2", "a-decode-1"]
    asked = [(probe.process, probe.url.partition("{port:")[2].partition("}")[0]) for probe in made.probes]
    through = [("a-decode-1", "a-router"), ("a-router-prefill", "a-router-prefill"), ("a-router", "a-router")]
    assert asked == [*((name, name) for name in halves), *through]
    assert {probe.expect for probe in made.probes} == {"usage.completion_tokens"}
    check_golden("disaggregated.json", made)


def test_halves_that_could_not_move_anything_are_not_started(shell, serve_file, model_dir):
    path = serve_file(
        f"- serve_id: a\n  engine: vllm\n  engine_args: {{model: {model_dir}}}\n", experiment=PAIR
    )
    shell.env["FAKE_MISSING"] = "nixl,nixl_rocm"
    done = shell("run", path, "--detach")
    assert done.returncode == 3
    assert "has no `nixl`" in done.stderr
    assert "pip install nixl" in done.stderr
    assert not shell.engine_pids()


def test_what_the_file_says_of_the_connector_is_kept(serve_file):
    args = "kv_transfer_config: {kv_connector: NixlConnector, kv_load_failure_policy: fail}"
    prefill, _, decode, *_ = plan(served(serve_file, args, DISAGGREGATED), NVIDIA, python="py").processes
    for one, role in ((prefill, "kv_producer"), (decode, "kv_consumer")):
        assert kv_config(one) == {
            "kv_connector": "NixlConnector",
            "kv_role": role,
            "kv_load_failure_policy": "fail",
        }


@pytest.mark.parametrize(
    ("connector", "said"),
    [
        ("P2pNcclConnector", "vLLM 0.25 and later have no P2pNcclConnector: leave it out"),
        ("LMCacheConnectorV1", "prefill and decode are connected by NixlConnector: leave it out"),
    ],
)
def test_other_connectors_are_refused(serve_file, connector, said):
    args = f"kv_transfer_config: {{kv_connector: {connector}}}"
    with pytest.raises(InvalidService, match=said):
        plan(served(serve_file, args, DISAGGREGATED), NVIDIA)


def test_prefill_and_decode_on_chosen_hosts(serve_file):
    experiment = served(
        serve_file,
        "tensor_parallel_size: 4",
        DISAGGREGATED + "    prefill_address: 10.0.0.1\n    decode_address: 10.0.0.2\n",
    )
    made = plan(experiment, NVIDIA, nodes=nodes(), python="py", router_python="router-py")
    routers = ["10.0.0.1"] * 2
    assert [one.host for one in made.processes] == ["10.0.0.1", "10.0.0.1", "10.0.0.2", *routers]
    decode = made.processes[2]
    assert decode.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "{own_address}"
    # Four devices count their ports on from the first, so that these are fixed, and leased.
    assert [made.ports[f"a-decode-1-kv-{number}"] for number in range(4)] == [21201, 21202, 21203, 21204]
    assert made.port_hosts["a-decode-1-kv-0"] == "10.0.0.2"
    check_golden("disaggregated-hosts.json", made)


def test_each_half_of_several_has_a_router_that_tries_again(serve_file):
    experiment = DISAGGREGATED.replace("decode_num: 1", "decode_num: 2")
    *_, prefills, decodes, router = plan(served(serve_file, "", experiment), NVIDIA).processes
    assert [one.name for one in (prefills, decodes)] == ["a-router-prefill", "a-router-decode"]
    assert words(router).endswith(
        "--prefill http://127.0.0.1:{port:a-router-prefill} --decode http://127.0.0.1:{port:a-router-decode}"
    )
    # Nobody else could answer for a half, so that it is never left out; in a half, one that is dead is.
    assert "--health-failure-threshold 1073741824" in words(router)
    assert "--health-failure-threshold 2 " in words(prefills)


def test_what_is_chosen_by_headers_is_chosen_where_they_arrive(serve_file):
    service = of_experiment(served(serve_file, "", DISAGGREGATED), default_engine="vllm")
    by_header = replace(
        service, fronts=tuple(replace(one, policy="consistent_hash") for one in service.fronts)
    )
    *_, decode, router = plan(by_header, NVIDIA).processes
    assert decode.name == "a-decode-1"
    assert words(router).count("--prefill ") == 2
    assert "--health-failure-threshold 2 " in words(router)


def test_a_key_that_the_router_would_lose_is_refused(serve_file):
    with pytest.raises(InvalidService, match="api_key: the router that parts prefill from decode"):
        plan(served(serve_file, "api_key: k", DISAGGREGATED), NVIDIA)


def test_a_half_on_two_hosts_has_its_ports_on_both(serve_file):
    """Each copy listens where keys and values are fetched, at the first port and its rank."""
    made = plan(served(serve_file, "data_parallel_size: 8", DISAGGREGATED), NVIDIA, nodes=FOUR_HOSTS[:3])
    assert [one.host for one in made.processes] == [*HOSTS[:2], "10.0.1.1", "10.0.0.1", "10.0.0.1"]
    tight = tuple(replace(node, slots=6) for node in FOUR_HOSTS)
    file = served(
        serve_file, "data_parallel_size: 4", DISAGGREGATED.replace("prefill_num: 2", "prefill_num: 1")
    )
    made = plan(file, NVIDIA, nodes=tuple(replace(node, slots=2) for node in tight))
    assert [one.name for one in made.processes][:2] == ["a-prefill-1", "a-prefill-1-rank-1"]
    for number in range(4):
        here, there = f"a-prefill-1-kv-{number}", f"a-prefill-1-rank-1-kv-{number}"
        assert made.ports[here] == made.ports[there] == 21001 + number
        assert [made.port_hosts[name] for name in (here, there)] == ["10.0.0.1", "10.0.0.2"]
    assert {one.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] for one in made.processes[:2]} == {
        "{port:a-prefill-1-kv-0}"
    }


def test_the_ports_of_the_file_are_used(serve_file):
    runner = "runner:\n  master_port: 29777\n  ray_port: 6400\n"
    made = plan(served(serve_file, "tensor_parallel_size: 16", runner), NVIDIA, nodes=nodes())
    assert made.ports["a-ranks"] == 29777
    args = "tensor_parallel_size: 16, distributed_executor_backend: ray"
    assert plan(served(serve_file, args, runner), NVIDIA, nodes=nodes()).ports["a-ranks"] == 6400


def test_what_does_nothing_here_is_said(serve_file):
    made = plan(served(serve_file, "", DISAGGREGATED + UNUSED), NVIDIA)
    assert made.facts["warnings"] == [
        "experiment.runner.deploy.prefill_decode_log_dir: /logs: not used: every log is in the run directory",
        "experiment.runner.deploy.pd_proxy_port: 30001: not used: the router is told all addresses",
    ]


def test_a_chosen_host_must_be_there(serve_file):
    experiment = served(serve_file, "", DISAGGREGATED + "    decode_address: 10.9.9.9\n")
    with pytest.raises(InvalidService, match=r"host 10.9.9.9: not among the hosts 10.0.0.1, 10.0.0.2"):
        plan(experiment, NVIDIA, nodes=nodes())


def test_copies_stand_behind_a_router(serve_file):
    experiment = served(serve_file, "port: 8000", more="  resources: {num_replicas: 2}\n")
    made = plan(experiment, NVIDIA, python="py", router_python="rp", ready_timeout_s=60)
    assert [process.name for process in made.processes] == ["a-1", "a-2", "a-router"]
    urls = "--worker-urls http://127.0.0.1:{port:a-1} http://127.0.0.1:{port:a-2}"
    assert urls in words(made.processes[2])
    assert "--worker-startup-timeout-secs 60" in words(made.processes[2])
    assert made.ports["a-router"] == 8000
    assert [one.get("behind") for one in made.facts["instances"]] == ["a-router", "a-router", None]


@pytest.mark.parametrize("engine", ["transformers", "llama_cpp"])
def test_some_engines_do_not_part_prefill_from_decode(serve_file, engine):
    with pytest.raises(InvalidService, match="use engine `vllm`"):
        plan(served(serve_file, "", DISAGGREGATED, engine=engine), NVIDIA)


def test_sglangs_halves_meet_at_a_port_of_the_prefill(serve_file):
    own = SGLANG % "disaggregation_transfer_backend: nixl, disaggregation_ib_device: mlx5_0"
    experiment = served(serve_file, "served_model_name: m", DISAGGREGATED, engine="sglang", more=own)
    made = plan(experiment, NVIDIA, python="py", router_python="router-py")
    first, second, decode, front = made.processes
    names = ["a-prefill-1", "a-prefill-2", "a-decode-1", "a-router"]
    assert [one.name for one in made.processes] == names
    for one, port in ((first, "a-prefill-1"), (second, "a-prefill-2")):
        assert "--disaggregation-mode prefill" in words(one)
        assert words(one).endswith(f"--disaggregation-bootstrap-port {{port:{port}-bootstrap}}")
        assert made.ports[f"{port}-bootstrap"] is None
    assert "--disaggregation-mode decode" in words(decode)
    assert "bootstrap" not in words(decode)
    for one in (first, decode):
        assert "--disaggregation-transfer-backend nixl" in words(one)
        assert "--disaggregation-ib-device mlx5_0" in words(one)
    assert words(front).startswith("router-py -m sglang_router.launch_router --host 127.0.0.1 --port")
    # It tries again itself, so that the two prefills need no router of their own.
    assert words(front).endswith(
        "--pd-disaggregation "
        "--prefill http://127.0.0.1:{port:a-prefill-1} {port:a-prefill-1-bootstrap} "
        "--prefill http://127.0.0.1:{port:a-prefill-2} {port:a-prefill-2-bootstrap} "
        "--decode http://127.0.0.1:{port:a-decode-1}"
    )
    # Its breakers would charge decode with the failures of a prefill.
    assert "--health-check-interval-secs 1 --health-failure-threshold 2 " in words(front)
    assert "--cb-failure-threshold 1073741824 " in words(front)
    assert "--retry-max-retries 9 " in words(front)
    # A half is not asked by itself: it would refuse, for nobody tells it where the other half is.
    asked = [(probe.method, probe.url.partition("}")[2], probe.expect) for probe in made.probes]
    assert asked[:3] == [("GET", "/health_generate", None)] * 3
    assert {one[:2] for one in asked[3:]} == {("POST", "/v1/completions")}
    check_golden("disaggregated-sglang.json", made)


def test_sglangs_halves_on_chosen_hosts(serve_file):
    chosen = "    prefill_address: 10.0.0.1\n    decode_address: 10.0.0.2\n"
    own = SGLANG % "disaggregation_bootstrap_port: 8999"
    file = served(serve_file, "tensor_parallel_size: 4", DISAGGREGATED + chosen, engine="sglang", more=own)
    made = plan(file, NVIDIA, nodes=nodes(), python="py")
    assert [one.host for one in made.processes] == ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.1"]
    # The file's number is the first one's; two on one host cannot have the same.
    ports = [made.ports[f"a-prefill-{number}-bootstrap"] for number in (1, 2)]
    assert ports == [8999, None]
    assert "a-decode-1-bootstrap" not in made.ports
    where = "--prefill http://{address:10.0.0.1}:{port:a-prefill-1} {port:a-prefill-1-bootstrap}"
    assert where in words(made.processes[-1])
    assert all("--host {own_address}" in words(one) for one in made.processes)


def test_one_half_of_sglang_said_for_both_is_refused(serve_file):
    own = SGLANG % "disaggregation_mode: decode"
    with pytest.raises(InvalidService, match=r"disaggregation_mode: 'decode': deploy\.prefill"):
        plan(served(serve_file, "", PAIR, engine="sglang", more=own), NVIDIA)


def test_a_policy_that_sglangs_router_lacks_is_refused(serve_file):
    service = of_experiment(served(serve_file, "", PAIR, engine="sglang"), default_engine="vllm")
    fronts = tuple(replace(one, policy="consistent_hash") for one in service.fronts)
    with pytest.raises(InvalidService, match="sglang-router, which parts prefill from decode for sglang"):
        plan(replace(service, fronts=fronts), NVIDIA)


def test_a_router_that_is_not_there_is_named_with_its_cure(shell, serve_file, model_dir):
    item = f"- serve_id: a\n  engine: sglang\n  engine_args: {{model: {model_dir}}}\n"
    service = of_experiment(load(serve_file(item, experiment=PAIR)), default_engine="vllm")
    python = shell.env["FLAGSCALE_SERVE_PYTHON"]
    with mock.patch.dict(os.environ, {**shell.env, "FAKE_MISSING": "vllm_router"}):
        check_router(service, python)  # the other one is not needed
    with (
        mock.patch.dict(os.environ, {**shell.env, "FAKE_MISSING": "sglang_router"}),
        pytest.raises(EngineMissing, match=r"sglang-router, .*flagscale-serve\[sglang-router\]"),
    ):
        check_router(service, python)


@pytest.mark.parametrize(
    ("own", "missing", "said"),
    [
        ("", "mooncake", "has no `mooncake`, by which SGLang .*`pip install mooncake-transfer-engine`"),
        (
            "disaggregation_transfer_backend: nixl",
            "nixl",
            "has no `nixl`, by which SGLang .*`pip install nixl`",
        ),
    ],
)
def test_sglangs_halves_that_could_not_move_anything_are_not_started(
    shell, serve_file, model_dir, own, missing, said
):
    shell.env["FAKE_MISSING"] = missing
    more = (SGLANG % own) if own else ""
    item = f"- serve_id: a\n  engine: sglang\n  engine_args: {{model: {model_dir}}}\n"
    service = of_experiment(load(serve_file(item + more, experiment=PAIR)), default_engine="vllm")
    with mock.patch.dict(os.environ, shell.env), pytest.raises(EngineMissing, match=said):
        check_engines(service, shell.env["FLAGSCALE_SERVE_PYTHON"], "nvidia")


# --- where the hosts come from ------------------------------------------------------------------------------


def test_the_hostfile_is_read_and_containers_are_entered(serve_file, tmp_path):
    (tmp_path / "hosts").write_text("10.0.0.1 slots=8\n10.0.0.2 slots=8\n10.0.0.3 slots=4\n")
    experiment = served(
        serve_file,
        "",
        f"runner:\n  hostfile: {tmp_path / 'hosts'}\n  nnodes: 2\n  ssh_port: 2222\n  docker: box",
    )
    assert [
        (target.name, target.transport, target.port, target.docker) for target, _ in targets_of(experiment)
    ] == [("10.0.0.1", "ssh", 2222, "box"), ("10.0.0.2", "ssh", 2222, "box")]


def test_a_container_on_this_host_needs_no_hostfile(serve_file):
    ((target, _),) = targets_of(served(serve_file, "", "runner:\n  docker: box"))
    assert (target.transport, target.docker) == ("local", "box")


@pytest.mark.parametrize(
    ("runner", "message"),
    [
        ("nnodes: 2", "no hostfile says which hosts"),
        ("hostfile: no-such-file", "experiment.runner.hostfile: .*no-such-file"),
        ("nnodes: 3\n  hostfile: {hosts}", "has 1 hosts"),
    ],
)
def test_what_is_wrong_with_the_hosts_is_said(serve_file, shell, tmp_path, model_dir, runner, message):
    (tmp_path / "one").write_text("10.0.0.1 slots=8\n")
    experiment = served(serve_file, "", f"runner:\n  {runner.format(hosts=tmp_path / 'one')}")
    with pytest.raises(InvalidService, match=message):
        targets_of(experiment)


CLOUD = "runner:\n  type: cloud\n  nnodes: 2\n  nproc_per_node: 8\n"


def test_pods_are_counted_by_the_group_or_by_the_file(serve_file):
    experiment = served(serve_file, "tensor_parallel_size: 16", CLOUD)
    assert len(promised_nodes(experiment, NVIDIA, {})) == 2
    pods = promised_nodes(experiment, NVIDIA, {"LWS_GROUP_SIZE": "4", "LWS_LEADER_ADDRESS": "lead.svc"})
    assert [pod.target.reached_as for pod in pods] == ["lead.svc", "pod-1", "pod-2", "pod-3"]
    with pytest.raises(InvalidService, match="how many pods"):
        promised_nodes(served(serve_file, "", "runner:\n  type: cloud"), NVIDIA, {})


def test_a_cloud_file_becomes_a_leader_worker_set(serve_file, shell, model_dir):
    from flagscale_hw.testing import faked_host

    path = serve_file(
        f"- serve_id: a\n  engine: vllm\n  engine_args: {{model: {model_dir}, tensor_parallel_size: 16}}\n",
        experiment=CLOUD,
    )
    with faked_host("nvidia", 8):
        done = shell("plan", path, "--as", "lws", "--image", "registry/vllm:1", "--python", "python3")
        assert done.returncode == 0, done.stderr
        assert 'kind: "LeaderWorkerSet"' in done.stdout
        assert "LWS_LEADER_ADDRESS" in done.stdout
        assert "--headless" in done.stdout
        assert '"nvidia.com/gpu": 8' in done.stdout or "nvidia.com/gpu: 8" in done.stdout
        refused = shell("plan", path, "--as", "lws")
        assert refused.returncode == 2
        assert "--image" in refused.stderr
        run = shell("run", path)
        assert run.returncode == 2
        assert "kubectl apply -f -" in run.stderr


def test_the_hosts_of_a_file_are_never_left_out_in_silence(serve_file, tmp_path):
    (tmp_path / "hosts").write_text("10.0.0.1 slots=8\n")
    with pytest.raises(InvalidService, match="give the hosts"):
        plan(served(serve_file, "", f"runner:\n  hostfile: {tmp_path / 'hosts'}"), NVIDIA)


def test_a_plan_of_hosts_becomes_scripts(serve_file):
    made = plan(served(serve_file, "tensor_parallel_size: 16"), NVIDIA, nodes=nodes(), python="py")
    scripts = render_scripts(made)
    assert len(scripts) == 2
    assert "--headless" in list(scripts.values())[1]


ROUTED = "  resources: {num_replicas: 2}\n"


@pytest.fixture
def far_python(tmp_path, monkeypatch) -> Path:
    """A Python on hosts behind ssh, which are this one; it tells who asked for it, and may have a router."""
    ssh, python = tmp_path / "ssh", tmp_path / "python"
    ssh.write_text(
        "#!/bin/sh\nfor word; do host=$last; last=$word; done\n"
        f'export FAR_HOST="$host" PYTHONPATH="{tmp_path}/$host"\nexec sh -c "$last"\n'
    )
    python.write_text(
        f'#!/bin/sh\necho "$FAR_HOST" >> {tmp_path}/asked\nexec {sys.executable} "$@"\n',
    )
    for script in (ssh, python):
        script.chmod(0o755)
    monkeypatch.setenv("FLAGSCALE_SSH", str(ssh))
    other = replace(router.VLLM_ROUTER, distribution="some-router")
    monkeypatch.setattr(router, "VLLM_ROUTER", other)
    return python


def put_router(folder: Path) -> None:
    info = folder / "some_router-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-router\nVersion: 1.0\n")


def test_only_the_host_of_the_router_must_have_one(serve_file, far_python, tmp_path):
    made = plan(served(serve_file, "tensor_parallel_size: 8", more=ROUTED), NVIDIA, nodes=nodes())
    assert [one.host for one in made.processes] == ["10.0.0.1", "10.0.0.2", "10.0.0.1"]
    with pytest.raises(EngineMissing, match=r"a-router: .* on 10.0.0.1 does not have: install it there with"):
        check_routers(made, str(far_python))
    put_router(tmp_path / "10.0.0.1")
    check_routers(made, str(far_python))
    assert set((tmp_path / "asked").read_text().split()) == {"10.0.0.1"}


def test_without_a_router_no_host_is_asked(serve_file, far_python, tmp_path):
    check_routers(plan(served(serve_file, ""), NVIDIA, nodes=nodes()), str(far_python))
    assert not (tmp_path / "asked").exists()
