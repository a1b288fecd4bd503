"""JSON schemas of the kinds in cluster/kubernetes, from their documented fields: those that we use.

Stricter than the API server, which drops what it does not know: an unknown key is an error, here
even one that exists but that nobody here has used yet. Add it then, from the documentation.

Sources: KubeRay's API reference (ray.io/v1; `kuberay_facts` says since when), Kubernetes' (core/v1,
batch/v1, networking.k8s.io/v1, policy/v1) and that of the Prometheus operator. kubernetes-validate
would know the core kinds by itself, but weighs 108 MB: too much for everybody's `make test`.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SECONDS: Schema = {"type": "integer", "minimum": 1}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
CRON: Schema = {"type": "string", "pattern": r"^(\S+ ){4}\S+$"}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def some(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def mapping(required: Schema, optional: Schema | None = None) -> Schema:
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


_RESOURCES = mapping(
    {
        key: {
            "type": "object",
            "propertyNames": one_of("cpu", "memory", "nvidia.com/gpu"),
            "required": ["cpu", "memory"],
            "additionalProperties": QUANTITY,
        }
        for key in ("requests", "limits")
    }
)

# What the restricted Pod Security Standard asks for is required, not just allowed.
_CONTAINER_SECURITY = mapping(
    {
        "allowPrivilegeEscalation": {"const": False},
        "capabilities": mapping({"drop": {"const": ["ALL"]}}),
    }
)
_POD_SECURITY = mapping(
    {
        "runAsNonRoot": {"const": True},
        "runAsUser": {"const": 1000},
        "runAsGroup": {"const": 1000},
        "seccompProfile": mapping({"type": {"const": "RuntimeDefault"}}),
    },
    {"fsGroup": {"const": 1000}},
)

_ENV = mapping(
    {"name": {"type": "string", "pattern": "^[A-Z][A-Z0-9_]*$"}},
    {
        "value": STRING,
        "valueFrom": mapping({"secretKeyRef": mapping({"name": NAME, "key": STRING})}),
    },
)

_CONTAINER = mapping(
    {
        "name": NAME,
        "image": STRING,
        "securityContext": _CONTAINER_SECURITY,
        "resources": _RESOURCES,
    },
    {
        "command": some(STRING),
        "args": some(STRING),
        "env": some(_ENV),
        "envFrom": some(mapping({"secretRef": mapping({"name": NAME})})),
        "lifecycle": mapping({"preStop": mapping({"exec": mapping({"command": some(STRING)})})}),
        "ports": some(mapping({"name": NAME, "containerPort": PORT})),
        "volumeMounts": some(
            mapping({"name": NAME, "mountPath": STRING, "readOnly": {"const": True}})
        ),
    },
)

_POD = mapping(
    {"securityContext": _POD_SECURITY, "containers": some(_CONTAINER)},
    {
        "serviceAccountName": NAME,
        "automountServiceAccountToken": BOOLEAN,
        "restartPolicy": one_of("Never", "OnFailure"),
        "terminationGracePeriodSeconds": SECONDS,
        "nodeSelector": STRINGS,
        "tolerations": some(
            mapping(
                {
                    "key": STRING,
                    "operator": one_of("Exists"),
                    "effect": one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
                }
            )
        ),
        "volumes": some(mapping({"name": NAME, "configMap": mapping({"name": NAME})})),
    },
)

_POD_TEMPLATE = mapping(
    {
        "metadata": mapping(
            {"labels": STRINGS | {"required": ["app.kubernetes.io/part-of"]}},
            {"annotations": STRINGS},
        ),
        "spec": _POD,
    }
)


def _kind(api: str, kind: str, body: Schema, *, namespaced: bool = True) -> Schema:
    metadata = {"name": NAME, "labels": STRINGS | {"required": ["one4all/use"]}}
    return mapping(
        {
            "apiVersion": {"const": api},
            "kind": {"const": kind},
            "metadata": mapping(
                metadata | ({"namespace": NAME} if namespaced else {}), {"annotations": STRINGS}
            ),
        }
        | body
    )


_RAY_START_PARAMS = {  # strings, even where they are numbers
    "type": "object",
    "properties": {
        "num-cpus": {"type": "string", "pattern": "^[0-9]+$"},
        "object-store-memory": {"type": "string", "pattern": "^[0-9]{8,}$"},
    },
    "additionalProperties": False,
}

_RAY_CLUSTER = mapping(
    {
        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "authOptions": mapping({"mode": {"const": "token"}}),
        "headGroupSpec": mapping(
            {
                "serviceType": {"const": "ClusterIP"},
                "rayStartParams": _RAY_START_PARAMS,
                "template": _POD_TEMPLATE,
            }
        ),
        "workerGroupSpecs": some(
            mapping(
                {
                    "groupName": NAME,
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": _RAY_START_PARAMS,
                    "template": _POD_TEMPLATE,
                }
            )
        ),
        "enableInTreeAutoscaling": {"const": True},
        "autoscalerOptions": mapping(
            {
                "version": {"const": "v2"},
                "upscalingMode": one_of("Default", "Aggressive", "Conservative"),
                "idleTimeoutSeconds": SECONDS,
                "resources": _RESOURCES,
                "securityContext": _CONTAINER_SECURITY,
            }
        ),
    }
)

_RAY_JOB = mapping(
    {
        # KubeRay pastes it into a shell.
        "entrypoint": {"type": "string", "pattern": "^[A-Za-z0-9 ./:=_,-]+$"},
        "backoffLimit": COUNT,
        "activeDeadlineSeconds": SECONDS,
        "shutdownAfterJobFinishes": BOOLEAN,
        "ttlSecondsAfterFinished": COUNT,
        "submissionMode": one_of("K8sJobMode"),
        "submitterPodTemplate": _POD_TEMPLATE,
        "rayClusterSpec": _RAY_CLUSTER,
    }
)

SCHEMAS: dict[str, Schema] = {
    "Namespace": _kind("v1", "Namespace", {}, namespaced=False),
    "ServiceAccount": _kind("v1", "ServiceAccount", {}),
    "ConfigMap": _kind("v1", "ConfigMap", {"data": STRINGS}),
    "NetworkPolicy": _kind(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        {
            "spec": mapping(
                {
                    "podSelector": mapping({"matchLabels": STRINGS}),
                    "policyTypes": {"const": ["Ingress"]},
                    "ingress": some(
                        mapping(
                            {},
                            {
                                "from": some(
                                    mapping(
                                        {"podSelector": mapping({"matchLabels": STRINGS})},
                                        {"namespaceSelector": {"const": {}}},
                                    )
                                ),
                                "ports": some(mapping({"port": NAME, "protocol": one_of("TCP")})),
                            },
                        )
                    ),
                }
            )
        },
    ),
    "PodDisruptionBudget": _kind(
        "policy/v1",
        "PodDisruptionBudget",
        {
            "spec": mapping(
                {"maxUnavailable": {"const": 0}, "selector": mapping({"matchLabels": STRINGS})}
            )
        },
    ),
    "PodMonitor": _kind(
        "monitoring.coreos.com/v1",
        "PodMonitor",
        {
            "spec": mapping(
                {
                    "selector": mapping({"matchLabels": STRINGS}),
                    "podMetricsEndpoints": some(mapping({"port": NAME, "interval": STRING})),
                }
            )
        },
    ),
    "PrometheusRule": _kind(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        {
            "spec": mapping(
                {
                    "groups": some(
                        mapping(
                            {
                                "name": NAME,
                                "rules": some(
                                    mapping(
                                        {
                                            "alert": STRING,
                                            "expr": STRING,
                                            "for": STRING,
                                            "labels": STRINGS,
                                            "annotations": STRINGS,
                                        }
                                    )
                                ),
                            }
                        )
                    )
                }
            )
        },
    ),
    "CronJob": _kind(
        "batch/v1",
        "CronJob",
        {
            "spec": mapping(
                {
                    "schedule": CRON,
                    "timeZone": STRING,
                    "concurrencyPolicy": one_of("Allow", "Forbid", "Replace"),
                    "startingDeadlineSeconds": SECONDS,
                    "successfulJobsHistoryLimit": COUNT,
                    "failedJobsHistoryLimit": COUNT,
                    "jobTemplate": mapping(
                        {
                            "spec": mapping(
                                {
                                    "backoffLimit": COUNT,
                                    "activeDeadlineSeconds": SECONDS,
                                    "template": _POD_TEMPLATE,
                                }
                            )
                        }
                    ),
                }
            )
        },
    ),
    "RayCluster": _kind("ray.io/v1", "RayCluster", {"spec": _RAY_CLUSTER}),
    "RayJob": _kind("ray.io/v1", "RayJob", {"spec": _RAY_JOB}),
    "RayCronJob": _kind(
        "ray.io/v1",
        "RayCronJob",
        {
            "spec": mapping(
                {
                    "schedule": CRON,
                    "suspend": BOOLEAN,
                    "jobTemplate": _RAY_JOB,
                }
            )
        },
    ),
}
