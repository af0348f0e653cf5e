"""What a JobSet manifest may hold, from the API's own description (jobset.x-k8s.io/v1alpha2) and its webhook's checks.

A JobSet is a custom resource, so the schemas that come with Kubernetes know its templates (each is a Job) and not the
rest: that is described here, for the fields that are of use to a training job. Anything else is an error.
"""

import functools
import importlib.resources
import json
import re
from typing import Any

import jsonschema
import referencing

KUBERNETES = ("1.31", "1.37")  # the oldest in which podFailurePolicy is stable, and the newest that has schemas
REASONS = ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")


def _record(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def _list(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
_RULE = _record(
    ("name", "action"),
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", "maxLength": 128},
    action={"enum": list(ACTIONS)},
    onJobFailureReasons=_list({"enum": list(REASONS)}, uniqueItems=True),
    onJobFailureMessagePatterns=_list(_TEXT, uniqueItems=True),
    targetReplicatedJobs=_list(_TEXT),
)
_REPLICATED = _record(("name", "template"), name=_NAME, replicas=_COUNT, template={"type": "object"}, groupName=_NAME)
_SPEC = _record(
    ("replicatedJobs",),
    replicatedJobs=_list(_REPLICATED, minItems=1),
    network=_record((), enableDNSHostnames={"type": "boolean"}, publishNotReadyAddresses={"type": "boolean"}),
    failurePolicy=_record((), maxRestarts=_COUNT, rules=_list(_RULE, maxItems=20)),
    ttlSecondsAfterFinished=_COUNT,
    suspend={"type": "boolean"},
)
SCHEMA = _record(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_record(("name",), name=_NAME, namespace=_NAME, labels=_TEXTS, annotations=_TEXTS),
    spec=_SPEC,
)


@functools.cache
def _job_schema(version: str) -> jsonschema.Draft202012Validator:
    """Kubernetes' own schema of a Job, in which unknown fields are errors, as kubernetes-validate ships it."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    job, definitions = (json.loads((folder / name).read_text()) for name in ("job-batch-v1.json", "_definitions.json"))
    registry: referencing.Registry = referencing.Resource.from_contents(definitions) @ referencing.Registry()
    return jsonschema.Draft202012Validator(job, registry=registry)


def check(manifest: dict[str, Any]) -> None:
    """Raises where Kubernetes or JobSet would refuse a manifest."""
    jsonschema.validate(manifest, SCHEMA)
    name = manifest["metadata"]["name"]
    rules = [rule["name"] for rule in manifest["spec"].get("failurePolicy", {}).get("rules", [])]
    assert len(set(rules)) == len(rules)
    for replicated in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, **replicated["template"]}
        for version in KUBERNETES:
            _job_schema(version).validate(job)
        _check_job(job["spec"])
        pod = f"{name}-{replicated['name']}-{replicated['replicas'] - 1}-{job['spec']['completions'] - 1}-abcde"
        assert len(pod) <= 63, "the names of pods would be too long"


def _check_job(job: dict[str, Any]) -> None:
    """What the API server checks of a Job besides its schema, where there is a podFailurePolicy."""
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy wants restartPolicy: Never"
    containers = {container["name"] for container in pod["containers"]}
    for rule in job["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        codes = rule.get("onExitCodes", {"values": [1], "containerName": next(iter(containers))})
        assert codes["values"] == sorted(set(codes["values"])) and 0 not in codes["values"]
        assert codes["containerName"] in containers
    mounts = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
    assert mounts == {volume["name"] for volume in pod.get("volumes", [])}


def action_after(manifest: dict[str, Any], *, code: int | None = None, condition: str = "") -> str:
    """What JobSet does where a pod ends with an exit code or under a condition: the API's rules, in their order."""
    policy = manifest["spec"]["failurePolicy"]
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        matching = f"matching {rule['action']} rule at index {index}"
        if codes and code is not None and (code in codes["values"]) == (codes["operator"] == "In"):
            reason, message = (
                "PodFailurePolicy",
                f"Container program for pod a/b failed with exit code {code} {matching}",
            )
        elif condition in [entry["type"] for entry in conditions if entry["status"] == "True"]:
            message = f"Pod a/b has condition {condition} {matching}"
        else:
            continue
        reason = "PodFailurePolicy"
        assert rule["action"] == "FailJob"
        break
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", REASONS) and any(re.search(each, message) for each in patterns):
            return rule["action"]
    return "RestartJobSet"
