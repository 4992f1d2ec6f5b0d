"""Kubernetes: a plan as a JobSet or a LeaderWorkerSet, one pod for each host, with the script in a ConfigMap.

JobSet (`jobset.x-k8s.io/v1alpha2`) suits work that ends, such as training; LeaderWorkerSet
(`leaderworkerset.x-k8s.io/v1`) suits services. Both give pods stable names and numbers, which is all that the
script of a plan needs. Applying the text, and following it, is kubectl's job.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flagscale_hw.errors import InputError
from flagscale_hw.plan import Plan
from flagscale_hw.scripts import node_script, variable

__all__ = ["Pods", "render_kubernetes", "to_yaml"]

_SCRIPTS, _RUN = "/flagscale", "/run/flagscale"
_FIRST_PORT = 29500
_NAME_LIMIT = 40  # the controllers append numbers, and a label may have 63 characters
_CONFIG_MAP_LIMIT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Pods:
    """What the plan does not know of the pods."""

    image: str
    """Must hold the interpreter at the plan's path, and bash."""
    namespace: str = "default"
    resources: Mapping[str, Any] = field(default_factory=dict)
    """Extended resources of each pod, such as `{"nvidia.com/gpu": 8}`."""
    claims: Mapping[str, str] = field(default_factory=dict)
    """PersistentVolumeClaim -> absolute path; the experiment's directory must lie in one of them."""
    secret: str | None = None
    """Secret whose keys become environment variables: the plan's secrets are never written into the text."""
    shared_memory: str = "16Gi"
    """Size limit of `/dev/shm`, which data loaders and collective libraries use."""


def render_kubernetes(plan: Plan, kind: Literal["jobset", "lws"], pods: Pods) -> str:
    """Render the ConfigMap and the workload as YAML.

    Raises:
        InputError: the script does not fit into a ConfigMap, or the pods are not described as they must be.
    """
    for claim, path in pods.claims.items():
        if not path.startswith("/"):
            raise InputError(f"claim {claim}: path {path!r}: give an absolute path")
    name = _name_of(plan.name)
    count = max(1, len(plan.targets))
    script = _script(plan, kind, name, count)
    if len(script.encode()) > _CONFIG_MAP_LIMIT:
        raise InputError(
            f"{plan.name}: the script is larger than a ConfigMap can be: shorten the plan's files"
        )
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-script", "namespace": pods.namespace},
        "data": {"node.sh": script},
    }
    pod = _pod(plan, name, pods, ends=kind == "jobset")
    made = _jobset(plan, name, count, pod, pods) if kind == "jobset" else _lws(name, count, pod, pods)
    return to_yaml(config) + "---\n" + to_yaml(made)


def _name_of(text: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_NAME_LIMIT].strip("-")
    return name if name and name[0].isalpha() else f"run-{name}".strip("-")


def _script(plan: Plan, kind: str, name: str, count: int) -> str:
    if kind == "jobset":
        rank, address = "$JOB_COMPLETION_INDEX", f"{name}-node-0-$rank.{name}"
    else:
        rank, address = "$LWS_WORKER_INDEX", f"{name}-0-$rank.{name}"
    lines = [
        "#!/usr/bin/env bash",
        f"# {plan.kind} on {count} pods, written by FlagScale from the plan of the run.",
        "set -euo pipefail",
        f"FLAGSCALE_NODE_RANK={rank}",
        "FLAGSCALE_ADDRESSES=()",
        f'for ((rank = 0; rank < {count}; rank++)); do FLAGSCALE_ADDRESSES+=("{address}"); done',
    ]
    if kind == "lws":
        lines.append('FLAGSCALE_ADDRESSES[0]="$LWS_LEADER_ADDRESS"')
    for place, (port, number) in enumerate(sorted(plan.ports.items())):
        # A pod has a network of its own: any number is free.
        lines.append(f"{variable(port)}={number or _FIRST_PORT + place}")
    return "\n".join([*lines, *node_script(plan), ""]).rstrip("\n") + "\n"


def _pod(plan: Plan, name: str, pods: Pods, *, ends: bool) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "script", "configMap": {"name": f"{name}-script"}},
        {"name": "run", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pods.shared_memory}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "script", "mountPath": _SCRIPTS, "readOnly": True},
        {"name": "run", "mountPath": _RUN},
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the pod's own
    ]
    for number, (claim, path) in enumerate(pods.claims.items()):
        volumes.append({"name": f"data-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"data-{number}", "mountPath": path})
    container: dict[str, Any] = {
        "name": "node",
        "image": pods.image,
        "command": ["bash", f"{_SCRIPTS}/node.sh"],
        "env": [{"name": "FLAGSCALE_RUN_DIR", "value": _RUN}],
        "volumeMounts": mounts,
    }
    if pods.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": pods.secret}}]
    if pods.resources:
        container["resources"] = {"limits": dict(pods.resources), "requests": dict(pods.resources)}
    return {
        **({"restartPolicy": "Never"} if ends else {}),
        "terminationGracePeriodSeconds": int(plan.stop.grace_s) + 5,
        "containers": [container],
        "volumes": volumes,
    }


def _jobset(plan: Plan, name: str, count: int, pod: dict[str, Any], pods: Pods) -> dict[str, Any]:
    job = {
        "parallelism": count,
        "completions": count,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a lost pod concerns all: the set starts again as a whole
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "namespace": pods.namespace},
        "spec": {
            "failurePolicy": {"maxRestarts": plan.max_restarts},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _lws(name: str, count: int, pod: dict[str, Any], pods: Pods) -> dict[str, Any]:
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": name, "namespace": pods.namespace},
        "spec": {
            "replicas": 1,
            "leaderWorkerTemplate": {
                "size": count,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "workerTemplate": {"spec": pod},
            },
        },
    }


def to_yaml(data: Any, indent: int = 0) -> str:
    """Render plain data as YAML; keys as they stand, long texts as blocks."""
    pad = "  " * indent
    if isinstance(data, Mapping):
        return "".join(f"{pad}{key}:{_value(value, indent)}" for key, value in data.items())
    return "".join(f"{pad}-{_item(value, indent)}" for value in data)


def _item(value: Any, indent: int) -> str:
    if isinstance(value, Mapping) and value:
        return " " + to_yaml(value, indent + 1).lstrip(" ")
    return _value(value, indent)


def _value(value: Any, indent: int) -> str:
    if isinstance(value, Mapping | list | tuple) and value:
        return "\n" + to_yaml(value, indent + 1)
    if isinstance(value, str) and _fits_block(value):
        pad = "  " * (indent + 1)
        return " |\n" + "".join(f"{pad}{line}\n" if line else "\n" for line in value[:-1].split("\n"))
    text = _quoted(value) if isinstance(value, str) else json.dumps(value)
    return f" {text}\n"


def _quoted(text: str) -> str:
    """Quote a text as YAML does: as JSON, but every character that is not printable is escaped."""
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) <= 0xFFFF else f"\\U{ord(character):08x}"


def _fits_block(text: str) -> bool:
    """Tell whether a text survives as a literal block: lines, no control characters, one end of line."""
    is_plain = all(character in {"\n", "\t"} or character.isprintable() for character in text)
    return (
        "\n" in text[:-1]
        and text.endswith("\n")
        and not text.endswith("\n\n")
        and text[0] not in " \n\t"
        and is_plain
    )
