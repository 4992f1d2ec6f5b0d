"""What a FlagScale serve file means, and what is refused."""

from __future__ import annotations

import json

import pytest

from flagscale_config import load
from flagscale_hw.testing import fake_host
from flagscale_serve import InvalidService, of_experiment, of_model, plan


def service_of(path, *overrides, **more):
    return of_experiment(load(path, overrides), default_engine="vllm", **more)


ONE = """
- serve_id: vllm_model
  engine_args:
    model: /models/some-model
"""


def test_a_model_directory_is_one_instance_named_after_its_folder():
    service = of_model("models/My Model@2", cwd="/home/me", engine="transformers")
    (instance,) = service.instances
    assert instance.model == "/home/me/models/My Model@2"
    assert instance.served_names == ("My-Model-2", "/home/me/models/My Model@2", "models/My Model@2")
    assert (instance.host, instance.port, instance.engine) == ("127.0.0.1", None, "transformers")


def test_a_file_is_read_and_relative_paths_start_where_it_was_loaded(serve_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = serve_file(
        """
        - serve_id: vllm_model
          engine_args:
            model: ../models/./x
            served_model_name: org/name
            port: 9010
            max_model_len: 4096
        """,
        experiment="envs:\n  SOME: 1\ncmds:\n  before_start: ulimit -n 1000",
    )
    service = service_of(path)
    (instance,) = service.instances
    assert service.cwd == str(tmp_path)
    assert instance.model == str(tmp_path.parent / "models/x")
    assert instance.served_names == ("org/name",)
    assert instance.port == 9010
    assert dict(instance.options) == {"max_model_len": 4096}
    assert dict(service.env) == {"SOME": "1"}
    assert service.shell[:3] == ("bash", "-c", 'ulimit -n 1000\nexec "$@"')


def test_the_engines_own_section_wins_once_and_for_all(serve_file):
    path = serve_file(
        """
        - serve_id: a
          engine_args:
            model: /models/common
            port: 8001
            max_num_seqs: 8
            dtype: float16
          engine_args_specific:
            vllm:
              model: /models/own
              port: 8002
              max_num_seqs: 16
        """
    )
    (instance,) = service_of(path).instances
    assert instance.model == "/models/own"
    assert instance.port == 8002
    assert instance.settled == {"max_num_seqs": 16, "dtype": "float16"}
    (other,) = service_of(path, engine="transformers").instances
    assert (other.model, other.port) == ("/models/common", 8001)
    assert other.settled == {"max_num_seqs": 8, "dtype": "float16"}


@pytest.mark.parametrize(
    ("item", "backend", "forced", "expected"),
    [
        ("", "", None, "vllm"),
        ("", "transformers", None, "transformers"),
        ("vllm", "transformers", None, "vllm"),
        ("vllm", "vllm", "transformers", "transformers"),
    ],
)
def test_who_chooses_the_engine(serve_file, item, backend, forced, expected):
    path = serve_file(ONE + (f"  engine: {item}\n" if item else ""))
    overrides = [f"+experiment.task.backend={backend}"] if backend else []
    assert service_of(path, *overrides, engine=forced).instances[0].engine == expected


def test_every_list_item_is_an_instance(serve_file):
    path = serve_file(
        """
        - serve_id: Model A
          engine_args: {model: /models/a, port: 8001}
        - serve_id: model_b
          engine_args: {model: /models/b}
        """
    )
    assert [(i.name, i.model, i.port) for i in service_of(path).instances] == [
        ("model-a", "/models/a", 8001),
        ("model_b", "/models/b", None),
    ]


def test_deploy_port_is_the_first_instances(serve_file):
    path = serve_file(ONE, experiment="runner:\n  deploy:\n    port: 9000")
    assert service_of(path).instances[0].port == 9000
    with pytest.raises(InvalidService, match=r"serve\[0\].*9001 contradicts .*deploy.port 9000"):
        service_of(path, "+serve.0.engine_args.port=9001")


TWO_MODELS = """
- serve_id: a
  engine: vllm
  engine_args: {{model: /models/a, port: 8001{0}}}
  resources: {{num_replicas: 2}}
- serve_id: b
  engine: {2}
  engine_args: {{model: /models/b, port: 8001{1}}}
"""


def test_items_of_one_port_are_models_behind_one_address(serve_file):
    path = serve_file(TWO_MODELS.format("", ", served_model_name: other", "vllm"))
    service = service_of(path)
    assert [(one.name, one.port) for one in service.instances] == [("a-1", None), ("a-2", None), ("b", None)]
    (front,) = service.fronts
    assert (front.name, front.port, front.members) == ("a-router", 8001, ("a-1", "a-2", "b"))
    assert front.is_of_several_models
    made = plan(service, fake_host("nvidia", 8), python="py", router_python="py")
    router = next(one for one in made.processes if one.name == "a-router")
    words = " ".join(router.argv)
    assert words.startswith(
        "py {run_dir}/router_launch.py http://127.0.0.1:{port:a-router} a=http://127.0.0.1:{port:a-1} "
        "a=http://127.0.0.1:{port:a-2} other=http://127.0.0.1:{port:b} -- py -m vllm_router.launch_router "
    )
    assert "--enable-igw" in router.argv
    assert "--worker-urls" not in router.argv
    # The router answers for both, and the only instance of its model is asked through it too.
    through = [(one.body["model"], one.process) for one in made.probes if "{port:a-router}" in one.url]
    assert sorted(through) == [("a", "a-router"), ("other", "a-router"), ("other", "b")]


@pytest.mark.parametrize(
    ("first", "second", "engine", "message"),
    [
        (", served_model_name: m", ", served_model_name: m", "vllm", "give each item one served_model_name"),
        (", served_model_name: [a, c]", "", "vllm", "give each item one served_model_name"),
        (", api_key: k", "", "vllm", "one address has one host and one api_key"),
        (", host: 0.0.0.0", "", "vllm", "one address has one host and one api_key"),
        ("", "", "transformers", "b: the router adds fields to requests"),
    ],
)
def test_what_cannot_be_told_apart_needs_its_own_port(serve_file, first, second, engine, message):
    path = serve_file(TWO_MODELS.format(first, second, engine))
    with pytest.raises(InvalidService, match=f"port 8001: asked for by 'a' and by 'b': .*{message}"):
        service_of(path)


def test_parted_prefill_shares_its_port_with_no_other_model(serve_file):
    text = TWO_MODELS.format("", "", "vllm").replace("  resources: {num_replicas: 2}\n", "")
    path = serve_file(text, experiment="runner: {deploy: {prefill_decode_disaggregation: true}}")
    with pytest.raises(InvalidService, match="a: prefill and decode are parted"):
        service_of(path)


REFUSED = {
    "Ray's environment": ("runner:\n  runtime_env: {pip: [x]}", "experiment.runner.runtime_env: {'pip'"),
    "after the stop": ("cmds:\n  after_stop: rm -f x", "experiment.cmds.after_stop: 'rm -f x'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(serve_file, case):
    experiment, message = REFUSED[case]
    with pytest.raises(InvalidService) as caught:
        service_of(serve_file(ONE, experiment=experiment))
    assert message in str(caught.value)
    assert "not supported by this version" in str(caught.value)
    assert caught.value.exit_code == 2


def test_copies_that_would_never_get_ready_are_refused(serve_file):
    path = serve_file(ONE + "  resources:\n    num_replicas: 2\n")
    with pytest.raises(InvalidService, match="router adds fields"):
        of_experiment(load(path), default_engine="vllm", engine="transformers")


def test_copies_are_instances_behind_a_router_at_the_public_port(serve_file):
    path = serve_file(ONE + "    port: 8001\n  resources:\n    num_replicas: 3\n")
    service = service_of(path)
    assert [(one.name, one.port) for one in service.instances] == [
        ("vllm_model-1", None),
        ("vllm_model-2", None),
        ("vllm_model-3", None),
    ]
    (front,) = service.fronts
    assert (front.name, front.port, front.policy) == ("vllm_model-router", 8001, "power_of_two")
    assert front.members == tuple(one.name for one in service.instances)


@pytest.mark.parametrize(
    "resources", ["num_replicas: auto", "min_replicas: 1, max_replicas: 4", "num_replicas: 0"]
)
def test_a_number_of_copies_that_changes_is_refused(serve_file, resources):
    path = serve_file(ONE + f"  resources: {{{resources}}}\n")
    with pytest.raises(InvalidService, match=resources.replace(": ", r":? ").partition(",")[0]):
        service_of(path)


def test_prefill_and_decode_are_instances_of_one_item(serve_file):
    path = serve_file(
        ONE,
        experiment="""
        runner:
          deploy:
            prefill_decode_disaggregation: true
            prefill_num: 2
            decode_num: 1
            prefill_address: auto
            decode_address: host-b
            prefill_decode_strategy: robin
            pd_proxy_port: 30001
            port: 9000
        """,
    )
    service = service_of(path)
    assert [(one.name, one.role, one.wanted_host) for one in service.instances] == [
        ("vllm_model-prefill-1", "prefill", None),
        ("vllm_model-prefill-2", "prefill", None),
        ("vllm_model-decode-1", "decode", "host-b"),
    ]
    (front,) = service.fronts
    assert (front.policy, front.port) == ("round_robin", 9000)


def test_an_engines_own_words_for_what_the_service_settles(serve_file):
    path = serve_file(
        """
        - serve_id: a
          engine: sglang
          engine_args_specific: {sglang: {model_path: /models/own, tp: 8}}
        """
    )
    (instance,) = service_of(path).instances
    assert instance.model == "/models/own"
    assert instance.settled == {"tp_size": 8}


@pytest.mark.parametrize("name", ["a/b/c", "-x", "a--b", "x@main"])
def test_a_name_that_clients_cannot_write_is_refused(serve_file, name):
    path = serve_file(ONE + f"    served_model_name: {json.dumps(name)}\n")
    with pytest.raises(InvalidService, match="served_model_name"):
        service_of(path)


def test_a_file_of_another_task_is_refused(serve_file):
    path = serve_file(ONE)
    experiment = load(path).model_copy(update={"serve": ()})
    with pytest.raises(InvalidService, match="flagscale-serve runs files whose task type is `serve`"):
        of_experiment(experiment, default_engine="vllm")


def test_several_keys_are_refused(serve_file):
    path = serve_file(ONE + "    api_key: [first, second]\n")
    with pytest.raises(InvalidService, match="2 keys"):
        service_of(path)
