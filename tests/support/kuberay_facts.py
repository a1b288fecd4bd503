"""Facts about the fields of KubeRay's kinds that cluster/kubernetes uses: type, and since when.

Written down, in our own words, from public sources: the release notes of 1.5.1 (``authOptions``),
the API reference of 1.6.2 and 1.7.1, the types of the time before 1.5, and the changes that brought
RayCronJob (kuberay#4159), its ``suspend`` (#4313) and its ``timeZone`` (#4762, after 1.6). No
release was installed, so what is not in these sources may be missing here. A path that is not here
is a field that nobody here has found or used yet: look it up before you add it. Paths go into the
pod templates only as far as KubeRay itself reads them; what is below ``template`` is Kubernetes'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

COVERED = ("1.5.1", "1.7.1")  # the oldest and the newest release that was looked at
_OLD = "1.5.1"  # there then, and maybe long before

# Fields of RayCluster's spec: path, type in JSON, since.
_CLUSTER = {
    "rayVersion": (str, _OLD),
    "authOptions.mode": (str, "1.5.1"),
    "authOptions.secretName": (str, "1.6.0"),
    "enableInTreeAutoscaling": (bool, _OLD),
    "autoscalerOptions.version": (str, _OLD),  # since 1.4
    "autoscalerOptions.upscalingMode": (str, _OLD),
    "autoscalerOptions.idleTimeoutSeconds": (int, _OLD),
    "autoscalerOptions.resources": (dict, _OLD),
    "autoscalerOptions.securityContext": (dict, _OLD),
    "headGroupSpec.serviceType": (str, _OLD),
    "headGroupSpec.rayStartParams": (dict, _OLD),
    "headGroupSpec.template": (dict, _OLD),
    "workerGroupSpecs.groupName": (str, _OLD),
    "workerGroupSpecs.replicas": (int, _OLD),
    "workerGroupSpecs.minReplicas": (int, _OLD),
    "workerGroupSpecs.maxReplicas": (int, _OLD),
    "workerGroupSpecs.idleTimeoutSeconds": (int, _OLD),
    "workerGroupSpecs.rayStartParams": (dict, _OLD),
    "workerGroupSpecs.template": (dict, _OLD),
}
_JOB = {
    "entrypoint": (str, _OLD),
    "backoffLimit": (int, _OLD),
    "activeDeadlineSeconds": (int, _OLD),
    "shutdownAfterJobFinishes": (bool, _OLD),
    "ttlSecondsAfterFinished": (int, _OLD),
    "submissionMode": (str, _OLD),
    "submitterPodTemplate": (dict, _OLD),
    "suspend": (bool, _OLD),
} | {f"rayClusterSpec.{path}": fact for path, fact in _CLUSTER.items()}
_CRON_JOB = {
    "schedule": (str, "1.6.0"),
    "suspend": (bool, "1.6.0"),
    "timeZone": (str, "1.7.0"),
} | {f"jobTemplate.{path}": (kind, "1.6.0") for path, (kind, _) in _JOB.items()}

FIELDS: dict[str, dict[str, tuple[type, str]]] = {
    "RayCluster": _CLUSTER,
    "RayJob": _JOB,
    "RayCronJob": _CRON_JOB,
}
ENUMS = {
    "mode": {"disabled", "token"},
    "version": {"v1", "v2"},
    "upscalingMode": {"Default", "Aggressive", "Conservative"},
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
}


def needed_release(resource: dict[str, Any]) -> str:
    """The oldest release of KubeRay, of those covered, that takes a resource of its kinds.

    Raises:
        AssertionError: No release covered has one of the fields, or it is of another type.
    """
    facts = FIELDS[resource["kind"]]
    needed = _OLD
    for path, value in _leaves(resource["spec"], facts):
        assert path in facts, f"{resource['kind']}.spec.{path} is in no release that was looked at"
        kind, since = facts[path]
        assert type(value) is kind, f"{path} is a {kind.__name__}, not {value!r}"
        name = path.rpartition(".")[2]
        assert name not in ENUMS or value in ENUMS[name], f"{path} is one of {ENUMS[name]}"
        needed = max(needed, since)  # as text: no part has two digits yet
    return needed


def _leaves(node: Any, facts: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values down to what is a fact, members of a list under one path."""
    if path in facts or not isinstance(node, dict | list):
        yield path, node
        return
    for key, value in node.items() if isinstance(node, dict) else (("", m) for m in node):
        yield from _leaves(value, facts, ".".join(filter(None, (path, key))))
