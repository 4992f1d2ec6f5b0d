"""The rules of heterogeneous training, which FlagScale's Megatron fork asserts on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

from flagscale_config.arithmetic import divisors, nearest_multiples
from flagscale_config.errors import show
from flagscale_config.findings import Findings
from flagscale_config.heterogeneous import HeteroFile, Heterogeneous, Mesh
from flagscale_config.places import Path
from flagscale_config.runner import Runner
from flagscale_config.sections import read_field

__all__ = ["is_enabled", "read_heterogeneous"]

_MESH = 5
_FIELDS = {
    "hetero_device_types": "device_types",
    "hetero_current_device_type": "current_device_type",
    "hetero_pipeline_layer_split": "pipeline_layer_split",
    "hetero_use_cpu_communication": "use_cpu_communication",
    "expert_tensor_parallel_size_per_process_mesh": "expert_tensor_parallel_sizes",
}


def read_heterogeneous(
    given: Mapping[str, tuple[Any, Path]],
    options: Mapping[str, Any],
    runner: Runner | None,
    findings: Findings,
) -> Heterogeneous | None:
    """Return the heterogeneous layout that a train section asks for; None when there is none or it is wrong.

    Args:
        given: raw value and place of each of `HETERO_OPTIONS` that the file has.
        options: Megatron's options, checked one by one.
        runner: says how many processes there are; None when that section is broken.
        findings: takes every contradiction, at the place of the option to blame.
    """
    before = len(findings.problems)
    values = {
        name: read_field(HeteroFile, name, value, path, findings) for name, (value, path) in given.items()
    }
    if len(findings.problems) > before or not values.get("enable_hetero"):
        return None
    paths = {name: path for name, (_, path) in given.items()}
    meshes = _meshes(values.pop("hetero_process_meshes", None), paths, findings)
    if meshes is None:
        return None
    fields = {_FIELDS.get(name, name): value for name, value in values.items()}
    found = Heterogeneous(meshes=meshes, **fields)
    _Rules(found, options, runner, findings, paths).check()
    return found if len(findings.problems) == before else None


def is_enabled(given: Mapping[str, tuple[Any, Path]]) -> bool:
    """Whether the options of a file switch heterogeneous training on."""
    return "enable_hetero" in given and str(given["enable_hetero"][0]).lower() == "true"


def _meshes(
    given: Sequence[Any] | None, paths: Mapping[str, Path], findings: Findings
) -> tuple[Mesh, ...] | None:
    if not given:
        message = (
            "needs hetero_process_meshes: five numbers per mesh (tensor, context, expert, data, pipeline)"
        )
        findings.error("config/required", paths["enable_hetero"], message)
        return None
    flat = [number for item in given for number in (item if isinstance(item, tuple) else (item,))]
    if len(flat) % _MESH or any(isinstance(item, tuple) and len(item) != _MESH for item in given):
        message = f"{len(flat)} numbers are not five per mesh (tensor, context, expert, data, pipeline)"
        findings.error("config/arithmetic", paths["hetero_process_meshes"], message, show(given))
        return None
    names = list(Mesh.model_fields)
    return tuple(
        Mesh(**dict(zip(names, flat[start : start + _MESH], strict=True)))
        for start in range(0, len(flat), _MESH)
    )


class _Rules:
    """The fork's assertions, each with the numbers and the cure."""

    def __init__(
        self,
        hetero: Heterogeneous,
        options: Mapping[str, Any],
        runner: Runner | None,
        findings: Findings,
        paths: Mapping[str, Path],
    ) -> None:
        self.hetero = hetero
        self.options = options
        self.world_size = runner.world_size if runner is not None else None
        self.findings = findings
        self.paths = paths
        self.stages = sum(mesh.pipeline_model_parallel_size for mesh in hetero.meshes)

    def check(self) -> None:
        """Report every rule that is broken."""
        self._devices()
        self._world()
        self._pipeline()
        self._layers()
        self._like_meshes()
        self._batches()
        self._divisions()

    def error(self, name: str, message: str) -> None:
        path = self.paths.get(name) or self.findings.option_paths.get(name) or self.paths["enable_hetero"]
        given = self.options.get(name)
        self.findings.error("config/arithmetic", path, message, given)

    def _devices(self) -> None:
        types, count = self.hetero.device_types, len(self.hetero.meshes)
        if len(types) != count:
            message = f"{len(types)} device types for {count} meshes; give one per mesh, in the same order"
            self.error("hetero_device_types", message)
        current = self.hetero.current_device_type
        if current is not None and types and current not in types:
            message = f"{current!r} is none of hetero_device_types {', '.join(types)}"
            self.error("hetero_current_device_type", message)
        if self.hetero.standalone_embedding_stage:
            self.error("standalone_embedding_stage", "does not go with enable_hetero; remove it")
        sizes = self.hetero.expert_tensor_parallel_sizes
        if sizes and len(sizes) != count:
            message = f"{len(sizes)} sizes for {count} meshes; give one per mesh"
            self.error("expert_tensor_parallel_size_per_process_mesh", message)

    def _world(self) -> None:
        total = sum(mesh.world_size for mesh in self.hetero.meshes)
        if self.world_size is not None and self.world_size != total:
            each = " + ".join(str(mesh.world_size) for mesh in self.hetero.meshes)
            message = (
                f"the meshes need {each} = {total} processes (tensor x context x data x pipeline of each); "
                f"runner.nnodes x nproc_per_node is {self.world_size}"
            )
            self.error("hetero_process_meshes", message)

    def _pipeline(self) -> None:
        given = self.options.get("pipeline_model_parallel_size", 1)
        if given != self.stages:
            message = f"is {given}, but the meshes have {self.stages} stages together; write {self.stages}"
            name = "pipeline_model_parallel_size"
            self.error(name if name in self.options else "hetero_process_meshes", message)
        for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
            if self.options.get(name) is not None:
                self.error(name, "does not go with enable_hetero: stages of meshes are not interleaved")

    def _layers(self) -> None:
        split, layers = self.hetero.pipeline_layer_split, self.options.get("num_layers")
        if not split:
            if layers is not None and layers % self.stages:
                message = (
                    f"{layers} layers cannot form {self.stages} equal stages; set hetero_pipeline_layer_split"
                )
                self.error("enable_hetero", message)
            return
        if len(split) != self.stages:
            message = f"{len(split)} entries for {self.stages} stages; give the layers of each stage"
            self.error("hetero_pipeline_layer_split", message)
        if layers is not None and sum(split) != layers:
            message = f"the stages have {sum(split)} layers together, the model has num_layers {layers}"
            self.error("hetero_pipeline_layer_split", message)

    def _like_meshes(self) -> None:
        meshes = self.hetero.meshes
        contexts = [mesh.context_parallel_size for mesh in meshes]
        if len(set(contexts)) > 1:
            message = f"context parallel sizes {contexts} differ; they must be equal in all meshes"
            self.error("hetero_process_meshes", message)
        tensors = [mesh.tensor_model_parallel_size for mesh in meshes]
        if len(set(tensors)) > 1 and not self.options.get("sequence_parallel"):
            message = f"tensor parallel sizes {tensors} differ; that needs sequence_parallel: true"
            self.error("hetero_process_meshes", message)
        experts = [mesh.expert_model_parallel_size for mesh in meshes]
        if 1 in experts and set(experts) != {1}:
            message = f"expert parallel sizes {experts} mix 1 with others; all are 1, or none is"
            self.error("hetero_process_meshes", message)
        self._shared_embedding()

    def _shared_embedding(self) -> None:
        """Check what the first and the last mesh share: the embedding, tied or of multi-token prediction."""
        is_tied = not self.options.get("untie_embeddings_and_output_weights", False)
        if not is_tied and not self.options.get("mtp_num_layers"):
            return
        what = "tied embeddings" if is_tied else "multi-token prediction"
        first, last = self.hetero.meshes[0], self.hetero.meshes[-1]
        one, two = first.tensor_model_parallel_size, last.tensor_model_parallel_size
        if one != two:
            message = (
                f"{what} need equal tensor parallel sizes in the first and last mesh ({one} and {two} given)"
            )
            self.error("hetero_process_meshes", message)
        one, two = first.data_parallel_size, last.data_parallel_size
        if one == two or not self.options.get("use_distributed_optimizer"):
            return
        if one % two and two % one:
            message = (
                f"{what}: data parallel size {one} of the first and {two} of the last mesh do not divide"
            )
            self.error("hetero_process_meshes", message)
        elif not self.hetero.use_partial_reduce_for_shared_embedding:
            message = (
                f"{what} with data parallel sizes {one} and {two} in the first and last mesh need "
                "use_partial_reduce_for_shared_embedding: true"
            )
            self.error("hetero_process_meshes", message)

    def _batches(self) -> None:
        micro, whole = self.options.get("micro_batch_size"), self.options.get("global_batch_size")
        if not micro:
            return
        first = self.hetero.meshes[0].data_parallel_size
        for index, mesh in enumerate(self.hetero.meshes):
            size = mesh.data_parallel_size
            if first * micro % size:
                message = (
                    f"micro batch {micro} x data parallel {first} of the first mesh = {first * micro} cannot "
                    f"be shared by data parallel {size} of mesh {index + 1}; use micro batch "
                    f"{nearest_multiples(micro, size // gcd(first, size))}"
                )
                self.error("micro_batch_size", message)
        if whole and whole % (micro * first):
            unit = micro * first
            message = (
                f"{whole} is not a multiple of micro batch {micro} x data parallel {first} of the first mesh "
                f"= {unit}; use {nearest_multiples(whole, unit)}"
            )
            self.error("global_batch_size", message)

    def _divisions(self) -> None:
        """Check what each mesh divides by its own sizes."""
        heads, experts = self.options.get("num_attention_heads"), self.options.get("num_experts")
        for index, mesh in enumerate(self.hetero.meshes):
            tensor, expert = mesh.tensor_model_parallel_size, mesh.expert_model_parallel_size
            name = f"mesh {index + 1}"
            if heads and heads % tensor:
                allowed = ", ".join(map(str, divisors(heads)))
                message = (
                    f"{name}: {heads} attention heads cannot be shared by {tensor}; use one of {allowed}"
                )
                self.error("hetero_process_meshes", message)
            if expert > 1 and not experts:
                message = f"{name}: expert parallel size {expert}, but the model has no experts; use 1"
                self.error("hetero_process_meshes", message)
            elif experts and experts % expert:
                allowed = ", ".join(map(str, divisors(experts)))
                message = f"{name}: {experts} experts cannot be shared by {expert}; use one of {allowed}"
                self.error("hetero_process_meshes", message)
