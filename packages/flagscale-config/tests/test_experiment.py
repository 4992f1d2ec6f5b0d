"""The experiment section: typed, frozen, with what older files have elsewhere moved to its place."""

import copy
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from flagscale_config import Experiment, check, load


def lines(source: str, *overrides: str, severity: str = "error") -> list[str]:
    return [str(problem) for problem in check(source, overrides) if problem.severity == severity]


def test_paths_are_absolute_and_names_taken_over(tiny, tmp_path):
    experiment = load(tiny)
    assert experiment.name == "qwen3-tiny"
    assert Path(experiment.exp_dir) == tmp_path / "outputs/qwen3-tiny"
    assert Path(experiment.cwd) == tmp_path
    assert Path(experiment.source) == tmp_path / "conf/tiny.yaml"
    assert load(tiny, ["experiment.exp_dir=/else/where"]).exp_dir == "/else/where"
    assert load(tiny, ["~experiment.exp_dir"]).exp_dir == experiment.exp_dir


def test_defaults_are_flagscales(tiny):
    runner = load(tiny).runner
    assert (runner.type, runner.backend, runner.hostfile, runner.ssh_port) == ("ssh", "torchrun", None, None)
    assert (runner.deploy.use_fs_serve, runner.ray_port, runner.hang_detection_timeout) == (True, 6379, 1800)
    assert (runner.num_nodes, runner.world_size) == (1, 2)


def test_an_experiment_cannot_be_changed(tiny):
    experiment = load(tiny)
    with pytest.raises(ValidationError, match="frozen"):
        experiment.name = "x"
    with pytest.raises(TypeError, match="cannot be changed"):
        experiment.train.options["lr"] = 1
    with pytest.raises(TypeError, match="cannot be changed"):
        experiment.envs.update(A="1")
    with pytest.raises(TypeError, match="cannot be changed"):
        experiment.shortcuts.clear()


def test_an_experiment_travels(tiny):
    experiment = load(tiny)
    assert pickle.loads(pickle.dumps(experiment)) == experiment
    assert copy.deepcopy(experiment) == experiment
    again = Experiment.model_validate_json(experiment.model_dump_json())
    assert again.runner == experiment.runner
    assert again.train.options["lr"] == experiment.train.options["lr"]


def test_loading_twice_gives_the_same(tiny):
    assert load(tiny).model_dump_json() == load(tiny).model_dump_json()


def test_environment_values_become_text(tiny):
    experiment = load(
        tiny,
        [
            "++experiment.envs={CUDA_VISIBLE_DEVICES:0,FLAG:true,TEXT:'a,b',NONE:null}",
            "++experiment.envs.node_specific={h1:{A:1}}",
            "++experiment.envs.nodes_envs={h1:{B:2},h2:{A:3}}",
            "++experiment.envs.device_type_specific={A800:{X:y}}",
        ],
    )
    assert experiment.envs == {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "FLAG": "True",
        "TEXT": "a,b",
    }
    assert experiment.node_envs == {"h1": {"A": "1", "B": "2"}, "h2": {"A": "3"}}
    assert experiment.device_type_envs == {"A800": {"X": "y"}}
    (line,) = lines(tiny, "+experiment.envs.L=[1,2]")
    assert line.endswith("experiment.envs.L: an environment variable is text ([1, 2] given)")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "++experiment.task.type=trian",
            "must be one of train, serve, inference, compress, rl; did you mean train?",
        ),
        ("++experiment.runner.type=shh", "must be one of ssh, cloud; did you mean ssh?"),
        ("++experiment.runner.nproc_per_node=0", "must be at least 1 (0 given)"),
        ("++experiment.runner.nproc_per_node=eight", "must be an integer ('eight' given)"),
        ("++experiment.runner.nproc_per_node=2.5", "must be an integer (2.5 given)"),
        ("++experiment.runner.ssh_port=70000", "must be at most 65535 (70000 given)"),
        ("++experiment.runner.master_port=port", "must be an integer ('port' given)"),
        ("++experiment.runner.no_shared_fs=maybe", "must be true or false ('maybe' given)"),
        ("++experiment.runner.hang_detection_timeout=0", "must be more than 0"),
        ("++experiment.runner.deploy=8000", "must be a mapping (8000 given)"),
        ("++experiment.seed=abc", "must be an integer ('abc' given)"),
        ("++experiment.exp_name=[1]", "must be text ([1] given)"),
        ("~experiment.exp_name", "exp_name is required"),
        ("~experiment.task.type", "type is required"),
        ("~experiment.task", "task is required"),
    ],
)
def test_wrong_values_are_reported_once_at_their_place(override, expected, tiny):
    found = [line for line in lines(tiny, override) if expected in line]
    assert len(found) == 1
    assert "pydantic" not in found[0]
    if not override.startswith("~"):
        assert found[0].startswith(f"override '{override}': {override[2:].split('=')[0]}: ")


def test_numbers_of_nodes(tiny):
    assert load(tiny, ["experiment.runner.nnodes='2:4'"]).runner.num_nodes == 2
    assert load(tiny, ["experiment.runner.nnodes=null"]).runner.num_nodes == 1
    with_hosts = load(tiny, ["experiment.runner.nnodes=null", "+experiment.runner.hostfile=hosts"]).runner
    assert (with_hosts.num_nodes, with_hosts.world_size) == (None, None)


@pytest.mark.parametrize(
    "given", ["some", "'4:2'", "'0:2'", "0", "-1", "'1:'", "'1:2:3'", "1.5", "true", "[2]"]
)
def test_a_number_of_nodes_that_is_none_is_refused(given, tiny):
    (line,) = lines(tiny, f"experiment.runner.nnodes={given}")
    assert "experiment.runner.nnodes: must be a number of at least 1, or 'min:max' with min <= max (" in line


def test_a_range_of_nodes_without_quotes_is_a_number_to_yaml(edited):
    found = check(edited("conf/tiny.yaml", "nnodes: 1", "nnodes: 2:4"))
    (note,) = [problem for problem in found if problem.severity == "note"]
    assert str(note) == (
        "conf/tiny.yaml:7:31: experiment.runner.nnodes: YAML reads 2:4 as 124; write 124, "
        "or quote it if it is text"
    )


MISSPELT = """
    experiment: {exp_name: a, task: {type: %s}, runner: {nods: '???', deploy: {prt: xxx}}}
    train:
      system: {micro_batch_size: 1, tensor_model_paralel_size: '???', hetero_devce_types: '???'}
      model: {num_layrs: '${layers:??}', multiple_of: '???', use_mcore_models: '???', num_layers: '???'}
    serve: [{serve_id: a, modle: '???', engine_args: {modle: '???', dtpe: null, model: '???'}}]
    rl: {trainer: {nnods: '???', nnodes: '???'}, tainer: '???', data: '???'}
    """


@pytest.mark.parametrize(
    ("task", "misspelt", "unsupported"),
    [
        (
            "train",
            {"system.tensor_model_paralel_size", "system.hetero_devce_types", "model.num_layrs"},
            {"model.multiple_of"},
        ),
        ("serve", {"0.modle", "0.engine_args.modle", "0.engine_args.dtpe"}, set()),
        ("rl", {"trainer.nnods", "tainer"}, set()),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_named_even_if_its_value_is_still_to_be_given(task, misspelt, unsupported, project):
    project({"e.yaml": MISSPELT % task})
    found = check("e.yaml")

    def keys(code):
        return {problem.key for problem in found if problem.code == code}

    runner = {"experiment.runner.nods", "experiment.runner.deploy.prt"}
    assert keys("config/unknown-key") == runner | {f"{task}.{key}" for key in misspelt}
    assert keys("config/unsupported") == {f"{task}.{key}" for key in unsupported}
    asked = keys("config/required")
    assert keys("config/unknown-key") - {f"{task}.0.engine_args.dtpe"} <= asked
    hints = {problem.key: problem.suggestion for problem in found if problem.code == "config/unknown-key"}
    assert hints["experiment.runner.nods"] == "nnodes"
    assert [key for key, hint in hints.items() if hint is None] == ["rl.tainer"] * (task == "rl")


def test_old_places_are_read_and_noted(tiny):
    experiment = load(tiny, ["+experiment.deploy={port:6701}", "+experiment.runner.type=torchrun"])
    assert experiment.runner.deploy.port == 6701
    assert experiment.runner.type == "ssh"
    notes = "\n".join(experiment.notes)
    assert "moved to experiment.runner.deploy" in notes
    assert "torchrun is a backend, not a type" in notes


def test_odd_old_places_are_refused_not_joined(tiny):
    assert any(
        "experiment.runner: must be a mapping" in line
        for line in lines(tiny, "~experiment.runner", "+experiment.runner=[]", "+experiment.deploy={port:1}")
    )


def test_an_entrypoint_is_accepted_and_noted(tiny):
    experiment = load(tiny, ["+experiment.task.entrypoint=flagscale/train/megatron/train_gpt.py"])
    assert experiment.task.entrypoint == "flagscale/train/megatron/train_gpt.py"
    assert any("is not used" in note for note in experiment.notes)


def test_every_key_of_a_full_runner_is_typed(project):
    project(
        {
            "e.yaml": """
                experiment:
                  exp_name: all
                  exp_dir: out
                  seed: 42
                  save_steps: 100
                  load: null
                  ckpt_format: torch
                  model: /m
                  tokenizer: /t
                  vq_model: v
                  ckpt_convert_save: s
                  shell_cmds: null
                  task: {type: serve, backend: vllm, entrypoint: null}
                  runner:
                    type: cloud
                    backend: torchrun
                    hostfile: hosts.txt
                    nnodes: 2
                    nproc_per_node: 8
                    node_rank: 0
                    master_addr: 10
                    master_port: 29500
                    rdzv_backend: static
                    rdzv_endpoint: h:1
                    rdzv_id: 7
                    tee: 3
                    redirects: 3
                    log_dir: logs
                    per_node_task: false
                    no_shared_fs: true
                    ssh_port: 22
                    docker: ds
                    device_type: gpu
                    ray_port: 6379
                    ray_dashboard_port: 8265
                    runtime_env: {a: 1}
                    enable_monitoring: true
                    enable_gpu_health_check: true
                    hang_detection_timeout: 60
                    cli_args: {model_path: m, port: 1, engine_args: "{}"}
                    heartbeat: {enabled: true, hardware_health: {enabled: true, interval_s: 1}}
                    tracing: {enabled: true, inspector: {enabled: true, min_size_bytes: 1}}
                    nsys_bin_path: n
                    nsys_rep_file_path: r
                    hipprof_bin_path: h
                    hipprof_output_dir: o
                    deploy:
                      use_fs_serve: false
                      port: 9710
                      name: /x
                      enable_composition: true
                      request:
                        - {arg: prompt, type: str}
                        - {arg: i, type: "Optional[list]", required: false, default: []}
                      working_dir: w
                      prefill_decode_disaggregation: true
                      prefill_num: 2
                      decode_num: 2
                      prefill_address: 10.0.0.1
                      decode_address: 10.0.0.2
                      prefill_decode_strategy: random
                      prefill_decode_log_dir: l
                      pd_proxy_port: 1024
                  envs: {A: 1}
                  node_args: {h1: {engine_args: null}}
                  auto_tuner: {space: {tensor_model_parallel_size: [1, 2]}}
                  cmds: {before_start: "source x", after_stop: y}
                action: run
                serve: [{serve_id: m, engine: vllm, engine_args: {model: /m}}]
                """
        }
    )
    assert lines("e.yaml") == []
    experiment = load("e.yaml")
    assert experiment.runner.master_addr == "10"
    assert experiment.runner.deploy.request[1].default == []
    assert experiment.shortcuts["save_steps"] == 100
