"""Training over several kinds of chips: meshes of processes, each with a parallel layout of its own.

The options are those of FlagScale's Megatron fork (`enable_hetero`); stock Megatron has none. Their rules are
in `meshes.py`.
"""

from __future__ import annotations

from flagscale_config.base import Bool, Model, Positive, Text, Words

__all__ = ["HETERO_OPTIONS", "HeteroFile", "Heterogeneous", "Mesh"]


class Mesh(Model):
    """The layout of one group of like chips."""

    tensor_model_parallel_size: Positive
    """Processes that share each layer's matrices."""
    context_parallel_size: Positive
    """Processes that share each sequence."""
    expert_model_parallel_size: Positive
    """Processes that share the experts."""
    data_parallel_size: Positive
    """Copies of the mesh's stages."""
    pipeline_model_parallel_size: Positive
    """Stages the mesh holds."""

    @property
    def world_size(self) -> int:
        """Number of processes: tensor x context x data x pipeline."""
        return (
            self.tensor_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
            * self.pipeline_model_parallel_size
        )


class Heterogeneous(Model):
    """How a model is spread over several kinds of chips."""

    enable_hetero: Bool = False
    """Whether it is."""
    meshes: tuple[Mesh, ...] = ()
    """`hetero_process_meshes`: the meshes in pipeline order."""
    device_types: tuple[Text, ...] = ()
    """`hetero_device_types`: the hostfile's device type of each mesh."""
    current_device_type: Text | None = None
    """`hetero_current_device_type`: FlagScale's launcher sets it per host."""
    pipeline_layer_split: tuple[Positive, ...] = ()
    """`hetero_pipeline_layer_split`: layers of each stage, over all meshes."""
    use_cpu_communication: Bool = False
    """`hetero_use_cpu_communication`: whether meshes talk to each other through the hosts."""
    expert_tensor_parallel_sizes: tuple[Positive, ...] = ()
    """`expert_tensor_parallel_size_per_process_mesh`: processes that share each expert's matrices."""
    standalone_embedding_stage: Bool = False
    """Whether the embedding is a stage of its own."""
    use_partial_reduce_for_shared_embedding: Bool = False
    """Whether tied embeddings are reduced in parts."""


class HeteroFile(Model):
    """The options as they stand in a file."""

    enable_hetero: Bool = False
    """Train over several kinds of chips."""
    hetero_process_meshes: tuple[Positive, ...] | tuple[tuple[Positive, ...], ...] = ()
    """Five numbers per mesh: tensor, context, expert, data and pipeline parallel size."""
    hetero_device_types: Words = ()
    """Device type of each mesh, as the hostfile calls it."""
    hetero_current_device_type: Text | None = None
    """Device type of this host; FlagScale's launcher sets it."""
    hetero_pipeline_layer_split: tuple[Positive, ...] = ()
    """Layers of each pipeline stage, over all meshes."""
    hetero_use_cpu_communication: Bool = False
    """Let meshes talk to each other through the hosts."""
    expert_tensor_parallel_size_per_process_mesh: tuple[Positive, ...] = ()
    """Expert tensor parallel size of each mesh."""
    standalone_embedding_stage: Bool = False
    """Make the embedding a stage of its own."""
    use_partial_reduce_for_shared_embedding: Bool = False
    """Reduce tied embeddings in parts."""


HETERO_OPTIONS = frozenset(HeteroFile.model_fields)
"""The options, by the names that files use."""
