"""FlagScale's serve list becomes instances whose options are typed by the engines' tables."""

import pytest

from flagscale_config import check, load, option_table

HEAD = "experiment: {exp_name: s, exp_dir: out, task: {type: serve}}\nserve:\n"

VLLM = option_table("vllm").version
DTYPES = "auto, bfloat16, float, float16, float32, half"


def lines(source: str, *overrides: str, severity: str = "error") -> list[str]:
    return [str(problem) for problem in check(source, overrides) if problem.severity == severity]


@pytest.fixture
def serve(project):
    """Return a function that writes a serve file with these items and returns its name."""

    def make(items: str) -> str:
        project({"s.yaml": (HEAD + items).encode()})
        return "s.yaml"

    return make


def test_items_of_a_two_level_file_are_read(project):
    project(
        {
            "conf/serve.yaml": """
                defaults: [_self_, {serve: 8b}]
                experiment:
                  exp_name: qwen3_8b
                  exp_dir: outputs/${experiment.exp_name}
                  task: {type: serve}
                  runner: {hostfile: null, deploy: {use_fs_serve: false, port: 9710}}
                  envs: {CUDA_VISIBLE_DEVICES: "0,1"}
                """,
            "conf/serve/8b.yaml": """
                - serve_id: vllm_model
                  engine: vllm
                  engine_args:
                    model: /models/Qwen3-8B
                    tensor_parallel_size: 2
                    max-model-len: 32k
                    gpu_memory_utilization: 0.9
                    enforce_eager: true
                    trust_remote_code: false
                    limit_mm_per_prompt.image: 8
                    compilation_config: {mode: 3}
                    served_model_name: qwen
                    seed: null
                  engine_args_specific:
                    vllm: {max-num-seqs: 8}
                    sglang: {attention-backend: triton}
                    llama_cpp: null
                  resources: {num_replicas: 2, num_gpus: 1}
                  profile: {prefix_len: 0, input_len: 1024, output_len: 1024, num_prompts: 128}
                """,
        }
    )
    assert lines("conf/serve.yaml") == []
    experiment = load("conf/serve.yaml")
    (item,) = experiment.serve
    assert experiment.runner.deploy.port == 9710
    assert experiment.train is None
    assert item.engine_args == {
        "model": "/models/Qwen3-8B",
        "tensor_parallel_size": 2,
        "max_model_len": "32k",
        "gpu_memory_utilization": 0.9,
        "enforce_eager": True,
        "trust_remote_code": False,
        "limit_mm_per_prompt": {"image": 8},
        "compilation_config": {"mode": 3},
        "served_model_name": ("qwen",),
    }
    assert item.engine_args_specific == {
        "vllm": {"max_num_seqs": 8},
        "sglang": {"attention_backend": "triton"},
        "llama_cpp": {},
    }
    assert (item.resources.num_replicas, item.profile.num_prompts) == (2, 128)
    assert str(experiment.origin("serve.0.engine_args.tensor_parallel_size")) == "conf/serve/8b.yaml:5:5"


def test_overrides_reach_into_items(serve):
    source = serve("- {serve_id: m, engine_args: {model: a}}\n")
    assert load(source, ["serve.0.engine_args.model=b"]).serve[0].engine_args["model"] == "b"


@pytest.mark.parametrize(
    ("item", "where", "message"),
    [
        (
            "serve_id: m, engine_args: {tensor_paralel_size: 2}",
            "3:31: serve.0.engine_args.tensor_paralel_size",
            f"unknown option of vllm {VLLM}; did you mean tensor_parallel_size?",
        ),
        (
            "serve_id: m, engine_args: {num_layers: 2}",
            "3:31: serve.0.engine_args.num_layers",
            f"unknown option of vllm {VLLM}; it is an option of megatron and belongs under train.model",
        ),
        (
            "serve_id: m, engine_args: {tensor_parallel_size: two}",
            "3:31: serve.0.engine_args.tensor_parallel_size",
            "must be an integer ('two' given)",
        ),
        (
            "serve_id: m, engine_args: {dtype: bfloat15}",
            "3:31: serve.0.engine_args.dtype",
            f"must be one of {DTYPES} ('bfloat15' given); did you mean bfloat16?",
        ),
        ("engine: vllm", "3:3: serve.0", "serve_id is required"),
        (
            "serve_id: m, engine: vlm",
            "3:17: serve.0.engine",
            "must be one of vllm, sglang, llama_cpp, transformers, native; did you mean vllm? ('vlm' given)",
        ),
        ("serve_id: m, modle: x", "3:17: serve.0.modle", "unknown key; did you mean module?"),
        (
            "serve_id: m, engine_args_specific: {vlm: {a: 1}}",
            "3:40: serve.0.engine_args_specific.vlm",
            "unknown engine; allowed: llama_cpp, native, sglang, transformers, vllm",
        ),
        ("serve_id: m}\n- {serve_id: m", "4:4: serve.1.serve_id", "'m' is used twice; ids are unique"),
        (
            "serve_id: m, module: a.py, name: A, depends: [n]",
            "3:40: serve.0.depends",
            "depends on 'n', which is no serve_id of this file; known: m",
        ),
        (
            "serve_id: m, engine_args: {max-model-len: 1, max_model_len: 2}",
            "3:49: serve.0.engine_args.max_model_len",
            "given twice: 2 here, 1 in another spelling; keep one",
        ),
        (
            "serve_id: m, engine_args: {model: '???'}",
            "3:31: serve.0.engine_args.model",
            "required from the user: set it in the file or pass serve.0.engine_args.model=...",
        ),
    ],
)
def test_mistakes_in_items_are_located(item, where, message, serve):
    assert f"s.yaml:{where}: {message}" in lines(serve(f"- {{{item}}}\n"))


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("- text\n", "3:3: serve.0: must be a mapping with a serve_id ('text' given)"),
        ("  a: 1\n", "2:1: serve: must be a list of items, each with a serve_id ({'a': 1} given)"),
        ("  []\n", "2:1: serve: must be a list of items, each with a serve_id ([] given)"),
    ],
)
def test_items_must_be_mappings_in_a_list(items, expected, serve):
    assert lines(serve(items)) == [f"s.yaml:{expected}"]


def test_options_that_are_gone_are_noted(serve):
    source = serve("- {serve_id: m, engine_args: {disable_log_requests: true, swap_space: 4}}\n")
    assert lines(source) == []
    assert "swap_space" not in load(source).serve[0].engine_args
    assert len(lines(source, severity="note")) == 2


def test_classes_of_composed_applications_have_free_arguments(serve):
    source = serve(
        "- {serve_id: a, module: m.py, name: A, engine_args: {anything: [1]}, resources: {num_gpus: 1}}\n"
    )
    assert load(source).serve[0].engine_args == {"anything": [1]}
