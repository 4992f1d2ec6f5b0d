"""An unknown key is looked for in all sections and all engines."""

import pytest

from flagscale_config import check

HEAD = """
experiment: {exp_name: x, task: {type: serve}}
serve:
  - serve_id: m
    engine_args: {model: A, %s}
    engine_args_specific: {%s}
"""


@pytest.mark.parametrize(
    ("args", "specific", "expected"),
    [
        ("num_layers: 2", "", "it is an option of megatron and belongs under train.model"),
        ("lr: 1", "", "train.model.optimizer.lr_scheduler"),
        ("ssh_port: 1", "", "it belongs under experiment.runner"),
        ("num_replicas: 1", "", "it belongs under serve[].resources"),
        ("", "sglang: {max_num_seqs: 4}", "it is vLLM's name: sglang calls it max_running_requests"),
        ("", "llama_cpp: {max_model_len: 4}", "it is vLLM's name: llama_cpp calls it "),
        (
            "",
            "vllm: {max_running_requests: 4}",
            "it is an option of sglang: serve.0.engine_args_specific.sglang",
        ),
        ("max_num_sequs: 4", "", "did you mean max_num_seqs?"),
    ],
)
def test_keys_of_other_engines_and_sections_are_known(args, specific, expected, project):
    project({"s.yaml": HEAD % (args, specific)})
    (problem,) = [problem for problem in check("s.yaml") if problem.severity == "error"]
    assert expected in problem.message
    assert problem.suggestion
