"""Kubernetes: the rendered YAML against schemas.

ConfigMap, Job and pod are checked against Kubernetes' own published schemas (package kubernetes-validate).
Those of JobSet and LeaderWorkerSet are not on PyPI: the ones below are written from their API references,
strict about every member that we use, and leave the pod to Kubernetes' own.
"""

from __future__ import annotations

import copy

import jsonschema
import kubernetes_validate
import pytest
import yaml

import flagscale_hw as hw

pytestmark = pytest.mark.hosts

VERSION = "1.31"


def strict(required, **members):
    return {"type": "object", "required": required, "properties": members, "additionalProperties": False}


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
DNS = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
META = strict(["name"], name=DNS, namespace=DNS)
TEMPLATE = {"type": "object", "required": ["spec"]}
SCHEMAS = {
    "JobSet": strict(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
        kind={"const": "JobSet"},
        metadata=META,
        spec=strict(
            ["replicatedJobs"],
            failurePolicy=strict([], maxRestarts=NUMBER),
            network=strict([], enableDNSHostnames=FLAG, publishNotReadyAddresses=FLAG, subdomain=DNS),
            replicatedJobs={
                "type": "array",
                "minItems": 1,
                "items": strict(["name", "template"], name=DNS, replicas=NUMBER, template=TEMPLATE),
            },
        ),
    ),
    "LeaderWorkerSet": strict(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "leaderworkerset.x-k8s.io/v1"},
        kind={"const": "LeaderWorkerSet"},
        metadata=META,
        spec=strict(
            ["leaderWorkerTemplate"],
            replicas=NUMBER,
            leaderWorkerTemplate=strict(
                ["workerTemplate"],
                size={"type": "integer", "minimum": 1},
                restartPolicy={"enum": ["None", "Default", "RecreateGroupOnPodRestart"]},
                workerTemplate=TEMPLATE,
            ),
        ),
    ),
}


def documents(kind):
    names = ("node-0", "node-1")
    plan = hw.Plan(
        kind="train",
        name="Qwen 3",
        targets=tuple(hw.Target(name=name) for name in names),
        processes=tuple(
            hw.Process(name=f"train-{rank}", rank=rank, host=name, argv=("python3", "{address:node-0}"))
            for rank, name in enumerate(names)
        ),
    )
    pods = hw.Pods(
        image="example/train:1", resources={"nvidia.com/gpu": 8}, claims={"exp": "/exp"}, secret="keys"
    )
    config, made = yaml.safe_load_all(hw.render_kubernetes(plan, kind, pods))
    return config, made


def pod_of(made):
    if made["kind"] == "JobSet":
        return made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    return made["spec"]["leaderWorkerTemplate"]["workerTemplate"]


@pytest.mark.parametrize("kind", ["jobset", "lws"])
def test_the_text_fits_the_schemas(kind):
    config, made = documents(kind)
    kubernetes_validate.validate(config, VERSION, strict=True)
    jsonschema.validate(made, SCHEMAS[made["kind"]])
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **pod_of(made)}, VERSION, strict=True
    )


def test_the_job_of_a_jobset_fits_kubernetes_own_schema():
    _, made = documents("jobset")
    job = made["spec"]["replicatedJobs"][0]["template"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}
    kubernetes_validate.validate(whole, VERSION, strict=True)


@pytest.mark.parametrize("kind", ["jobset", "lws"])
def test_the_schemas_can_refuse(kind):
    _, made = documents(kind)
    wrong = copy.deepcopy(made)
    wrong["spec"]["parallel"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMAS[made["kind"]])
    pod = copy.deepcopy(pod_of(made))
    pod["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **pod}, VERSION, strict=True
        )
