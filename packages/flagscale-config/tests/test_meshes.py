"""Training over several kinds of chips: every rule of FlagScale's fork, each broken alone."""

import pytest

from flagscale_config import check, load

HETERO = {
    "hetero.yaml": """
        experiment:
          exp_name: hetero
          task: {type: train, backend: megatron}
          runner: {nnodes: 2, nproc_per_node: 8, hostfile: hosts}
        train:
          system:
            tensor_model_parallel_size: 2
            pipeline_model_parallel_size: 3
            sequence_parallel: true
            hetero:
              enable_hetero: true
              hetero_process_meshes: [2, 1, 1, 2, 2, 4, 1, 1, 2, 1]
              hetero_device_types: [A800, BI-V150]
              hetero_pipeline_layer_split: [6, 6, 12]
          model:
            num_layers: 24
            hidden_size: 1024
            num_attention_heads: 16
            untie_embeddings_and_output_weights: true
            seq_length: 2048
            max_position_embeddings: 2048
            micro_batch_size: 1
            global_batch_size: 16
            train_iters: 100
            lr: 1e-4
          data: {data_path: corpus, tokenizer: {tokenizer_type: NullTokenizer, vocab_size: 1024}}
        """
}
MESHES = "train.system.hetero.hetero_process_meshes"
SPLIT = "train.system.hetero.hetero_pipeline_layer_split"
TIED = "train.model.untie_embeddings_and_output_weights=false"
EQUAL_TENSORS = f"{MESHES}=[4,1,1,1,2,4,1,1,2,1]"
"""Meshes with the same tensor parallel size, as shared embeddings need it: 8 + 8 processes."""


@pytest.fixture
def hetero(project):
    return str(project(HETERO))


def test_a_layout_is_read(hetero):
    found = load(hetero).train.heterogeneous
    assert [mesh.world_size for mesh in found.meshes] == [8, 8]
    assert found.device_types == ("A800", "BI-V150")
    assert found.pipeline_layer_split == (6, 6, 12)
    one, two = found.meshes
    assert (one.tensor_model_parallel_size, one.data_parallel_size, one.pipeline_model_parallel_size) == (
        2,
        2,
        2,
    )
    assert (two.tensor_model_parallel_size, two.data_parallel_size, two.pipeline_model_parallel_size) == (
        4,
        2,
        1,
    )


def test_meshes_may_be_written_one_by_one(hetero):
    nested = f"{MESHES}=[[2,1,1,2,2],[4,1,1,2,1]]"
    assert load(hetero, [nested]).train.heterogeneous == load(hetero).train.heterogeneous


def test_without_the_switch_there_are_no_meshes(hetero):
    off = ["train.system.hetero.enable_hetero=false", "train.system.pipeline_model_parallel_size=2"]
    assert load(hetero, off).train.heterogeneous is None


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        ([f"~{MESHES}"], "enable_hetero", "needs hetero_process_meshes: five numbers per mesh"),
        ([f"{MESHES}=[2,1,1,2]"], MESHES, "4 numbers are not five per mesh"),
        ([f"{MESHES}=[[2,1,1,2],[4,1,1,2,1]]"], MESHES, "9 numbers are not five per mesh"),
        ([f"{MESHES}=[0,1,1,2,2,4,1,1,2,1]"], MESHES, "must be at least 1 (0 given)"),
        (
            ["train.system.hetero.hetero_device_types=[A800]"],
            "hetero_device_types",
            "1 device types for 2 meshes; give one per mesh",
        ),
        (
            ["+train.system.hetero.hetero_current_device_type=H100"],
            "hetero_current_device_type",
            "'H100' is none of hetero_device_types A800, BI-V150",
        ),
        (
            ["+train.system.hetero.standalone_embedding_stage=true"],
            "standalone_embedding_stage",
            "does not go with enable_hetero; remove it",
        ),
        (
            ["+train.system.hetero.expert_tensor_parallel_size_per_process_mesh=[1,1,1]"],
            "expert_tensor_parallel_size_per_process_mesh",
            "3 sizes for 2 meshes; give one per mesh",
        ),
        (
            ["experiment.runner.nnodes=3"],
            MESHES,
            "the meshes need 8 + 8 = 16 processes (tensor x context x data x pipeline of each); runner.nno",
        ),
        (
            ["train.system.pipeline_model_parallel_size=2"],
            "train.system.pipeline_model_parallel_size",
            "is 2, but the meshes have 3 stages together; write 3",
        ),
        (
            ["~train.system.pipeline_model_parallel_size"],
            MESHES,
            "is 1, but the meshes have 3 stages together; write 3",
        ),
        (
            ["+train.system.num_layers_per_virtual_pipeline_stage=2"],
            "train.system.num_layers_per_virtual_pipeline_stage",
            "stages of meshes are not interleaved",
        ),
        (
            [f"~{SPLIT}", "train.model.num_layers=25"],
            "train.system.hetero.enable_hetero",
            "25 layers cannot form 3 equal stages; set hetero_pipeline_layer_split",
        ),
        ([f"{SPLIT}=[12,12]"], SPLIT, "2 entries for 3 stages; give the layers of each stage"),
        ([f"{SPLIT}=[6,6,6]"], SPLIT, "the stages have 18 layers together, the model has num_layers 24"),
        (
            [
                f"{MESHES}=[2,2,1,1,2,4,1,1,2,1]",
                "train.model.global_batch_size=16",
                "train.model.micro_batch_size=2",
            ],
            MESHES,
            "context parallel sizes [2, 1] differ; they must be equal in all meshes",
        ),
        (
            ["train.system.sequence_parallel=false"],
            MESHES,
            "tensor parallel sizes [2, 4] differ; that needs sequence_parallel: true",
        ),
        (
            [f"{MESHES}=[2,1,2,2,2,4,1,1,2,1]", "+train.model.num_experts=8"],
            MESHES,
            "expert parallel sizes [2, 1] mix 1 with others; all are 1, or none is",
        ),
        (
            [TIED],
            MESHES,
            "tied embeddings need equal tensor parallel sizes in the first and last mesh (2 and 4 given)",
        ),
        (
            ["+train.model.mtp_num_layers=1"],
            MESHES,
            "multi-token prediction need equal tensor parallel sizes in the first and last mesh (2 and 4",
        ),
        (
            [
                TIED,
                EQUAL_TENSORS,
                "+train.system.use_distributed_optimizer=true",
                "train.model.micro_batch_size=2",
            ],
            MESHES,
            "sizes 1 and 2 in the first and last mesh need use_partial_reduce_for_shared_embedding",
        ),
        (
            [
                TIED,
                f"{MESHES}=[2,1,1,2,2,2,1,1,3,1]",
                "+train.system.use_distributed_optimizer=true",
                "experiment.runner.nnodes=1",
                "experiment.runner.nproc_per_node=14",
                "train.model.micro_batch_size=3",
                "train.model.global_batch_size=24",
            ],
            MESHES,
            "tied embeddings: data parallel size 2 of the first and 3 of the last mesh do not divide",
        ),
        (
            [f"{MESHES}=[4,1,1,1,2,4,1,1,2,1]"],
            "train.model.micro_batch_size",
            "= 1 cannot be shared by data parallel 2 of mesh 2; use micro batch 2",
        ),
        (
            ["train.model.global_batch_size=15"],
            "train.model.global_batch_size",
            "15 is not a multiple of micro batch 1 x data parallel 2 of the first mesh = 2; use 14 or 16",
        ),
        (
            ["train.model.num_attention_heads=18", "train.model.hidden_size=1152"],
            MESHES,
            "mesh 2: 18 attention heads cannot be shared by 4; use one of 1, 2, 3, 6, 9, 18",
        ),
        (
            [f"{MESHES}=[2,1,2,2,2,4,1,2,2,1]"],
            MESHES,
            "mesh 1: expert parallel size 2, but the model has no experts; use 1",
        ),
        (
            [f"{MESHES}=[2,1,2,2,2,4,1,2,2,1]", "+train.model.num_experts=9"],
            MESHES,
            "mesh 1: 9 experts cannot be shared by 2; use one of 1, 3, 9",
        ),
    ],
    ids=lambda item: item[:50].rpartition(".")[2] if isinstance(item, str) else None,
)
def test_a_broken_rule_is_named_with_its_cure(overrides, key, message, hetero):
    errors = [problem for problem in check(hetero, overrides) if problem.severity == "error"]
    found = [problem for problem in errors if problem.key.endswith(key) and message in problem.message]
    assert len(found) == 1, [str(problem) for problem in errors]


@pytest.mark.parametrize(
    "overrides",
    [
        [TIED, EQUAL_TENSORS, "train.model.micro_batch_size=2"],
        [
            TIED,
            EQUAL_TENSORS,
            "train.model.micro_batch_size=2",
            "+train.system.use_distributed_optimizer=true",
            "+train.system.hetero.use_partial_reduce_for_shared_embedding=true",
        ],
        ["+train.system.hetero.hetero_current_device_type=A800"],
        [f"~{SPLIT}"],
    ],
)
def test_a_cure_is_one(overrides, hetero):
    assert [str(problem) for problem in check(hetero, overrides) if problem.severity == "error"] == []
