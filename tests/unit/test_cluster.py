"""The files of cluster/: valid, safe, and about the command line that we have.

No Kubernetes, no AWS and no Docker is asked, so what this shows is that the files say what they are
meant to say; not that a cluster likes it.
"""

import configparser
import copy
import fnmatch
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import jsonschema
import pytest
import typer
import yaml
from support.builders import write_corpus
from support.cluster_schemas import SCHEMAS
from support.kuberay_facts import COVERED, FIELDS, needed_release
from support.kustomization import load, load_patch, render, split_field_path

from pipelines.cli.app import app
from pipelines.cli.operating import parse
from pipelines.protect.config import ProtectConfig
from pipelines.ray_session import worker_layout
from pipelines.settings import load_config
from pipelines.telemetry import METRICS
from pipelines.train.config import TrainConfig
from pipelines.train.plan import plan_training

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
OVERLAYS = ("gpu", "multi-gpu", "cpu-test", "raycronjob")
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
CONFIGS = {"protect": ProtectConfig, "train": TrainConfig}
VERBS = typer.main.get_command(app)


def rendered(overlay):
    return {
        (resource["kind"], resource["metadata"]["name"]): resource
        for resource in render(KUBERNETES / "overlays" / overlay)
    }


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request):
    return rendered(request.param)


def check(resource):
    jsonschema.Draft202012Validator(SCHEMAS[resource["kind"]]).validate(resource)


def pod_specs(node):
    """Every pod specification in a resource, however deep."""
    if isinstance(node, list):
        for member in node:
            yield from pod_specs(member)
    elif isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pod_specs(value)


# Syntax and schemas


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix == ".yaml"], ids=lambda p: p.stem
)
def test_every_yaml_parses_without_repeated_keys(path):
    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            assert len(keys) == len(set(keys)), f"a key comes twice: {keys}"
            return super().construct_mapping(node, deep)

    assert [document for document in yaml.load_all(path.read_text("utf-8"), Strict) if document]


def test_what_an_overlay_renders_is_valid(overlay):
    for resource in overlay.values():
        check(resource)


def test_what_monitors_it_is_valid_and_finds_our_pods():
    monitoring = render(KUBERNETES / "monitoring")
    assert {resource["kind"] for resource in monitoring} == {"PodMonitor", "PrometheusRule"}
    for resource in monitoring:
        check(resource)
    [monitor] = [resource for resource in monitoring if resource["kind"] == "PodMonitor"]
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    for pod in worker_pods(rendered("gpu")):
        [container] = pod["containers"]
        assert endpoint["port"] in [port["name"] for port in container["ports"]]
    [rule] = [resource for resource in monitoring if resource["kind"] == "PrometheusRule"]
    used = set(re.findall(r"ray_\w+", json.dumps(rule)))
    assert used <= {name for metric in METRICS.values() for name in metric.exported_names}


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ("gpu", {"RayJob": 2, "RayCluster": 1, "CronJob": 1}),
        ("multi-gpu", {"RayJob": 2, "RayCluster": 1, "CronJob": 1}),
        ("cpu-test", {"RayJob": 2, "RayCluster": 1, "CronJob": 1}),
        ("raycronjob", {"RayJob": 2, "RayCronJob": 1}),
    ],
)
def test_an_overlay_has_what_it_says(overlay, expected):
    common = {"Namespace": 1, "ServiceAccount": 1, "NetworkPolicy": 1, "ConfigMap": 1}
    common |= {"PodDisruptionBudget": 1}
    kinds = [kind for kind, _ in rendered(overlay)]
    assert {kind: kinds.count(kind) for kind in kinds} == common | expected


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_renders_the_same(overlay, tmp_path):
    ran = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)],
        env={
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "KUBECONFIG": "/dev/null",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    theirs = {
        (resource["kind"], resource["metadata"]["name"]): resource
        for resource in yaml.safe_load_all(ran.stdout)
    }
    assert theirs == rendered(overlay)


@pytest.mark.parametrize(
    ("key", "path", "value"),
    [
        (("RayJob", "one4all-protect"), "spec.entrypiont", "one4all protect a b"),
        (("RayJob", "one4all-protect"), "spec.backoffLimit", "1"),
        (("RayJob", "one4all-protect"), "spec.entrypoint", "one4all protect a b; reboot"),
        (("RayJob", "one4all-train"), "spec.concurrencyPolicy", "Forbid"),
        (("RayCronJob", "one4all-protect"), "spec.concurrencyPolicy", "Forbid"),
        (("RayCronJob", "one4all-protect"), "spec.timeZone", "Etc/UTC"),
        (("RayCronJob", "one4all-protect"), "spec.jobTemplate.spec", {}),
        (("RayJob", "one4all-train"), "spec.rayClusterSpec.workerGroupSpec", []),
        (("RayJob", "one4all-train"), "spec.rayClusterSpec.authOptions.mode", "disabled"),
        (("RayJob", "one4all-train"), "spec.rayClusterSpec.headGroupSpec.serviceType", "NodePort"),
    ],
)
def test_typos_and_holes_are_found(key, path, value):
    resource = copy.deepcopy(rendered("raycronjob")[key])
    *parents, last = path.split(".")
    node = resource
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(jsonschema.ValidationError):
        check(resource)


def test_a_required_field_is_missed():
    resource = copy.deepcopy(rendered("gpu")["CronJob", "one4all-protect"])
    del resource["spec"]["concurrencyPolicy"]
    with pytest.raises(jsonschema.ValidationError, match="concurrencyPolicy"):
        check(resource)


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [("gpu", "1.5.1"), ("multi-gpu", "1.5.1"), ("cpu-test", "1.5.1"), ("raycronjob", "1.6.0")],
)
def test_an_overlay_needs_the_kuberay_that_the_readme_says(overlay, expected):
    needed = [
        needed_release(resource)
        for (kind, _), resource in rendered(overlay).items()
        if kind in FIELDS
    ]
    assert max(needed) == expected
    text = (CLUSTER / "README.md").read_text("utf-8")
    assert "KubeRay 1.5.1 or newer" in text
    assert COVERED[1] in text
    comment = KUBERNETES / "overlays" / "raycronjob" / "raycronjob.yaml"
    assert "KubeRay 1.6 or newer" in comment.read_text("utf-8")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("spec.timeZone", "Etc/UTC", "1.7.0"),
        ("spec.jobTemplate.rayClusterSpec.authOptions.secretName", "mine", "1.6.0"),
    ],
)
def test_a_field_of_a_newer_kuberay_is_noticed(path, value, expected):
    resource = copy.deepcopy(rendered("raycronjob")["RayCronJob", "one4all-protect"])
    *parents, last = path.split(".")
    node = resource
    for parent in parents:
        node = node[parent]
    node[last] = value
    assert needed_release(resource) == expected
    node[last + "s"] = value
    with pytest.raises(AssertionError, match=f"{last}s is in no release"):
        needed_release(resource)


def worker_pods(overlay):
    for (kind, _), resource in overlay.items():
        if kind in ("RayJob", "RayCluster"):
            spec = resource["spec"].get("rayClusterSpec", resource["spec"])
            assert spec["autoscalerOptions"]["version"] == "v2"
            for group in spec["workerGroupSpecs"]:
                yield group["template"]["spec"]


def test_workers_reach_no_api_server_and_are_replaced_and_drained(overlay):
    pods = list(worker_pods(overlay))
    assert pods
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["restartPolicy"] == "Never"
        [container] = pod["containers"]
        script = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        [seconds] = re.findall(r"--deadline-remaining-seconds=(\d+)", script)
        assert int(seconds) < pod["terminationGracePeriodSeconds"]


def test_the_hook_tells_ray_which_node_goes_and_waits_until_it_has(tmp_path):
    """With a process in the place of Ray's, and the arguments that Ray gives it."""
    [container] = next(worker_pods(rendered("gpu")))["containers"]
    command = [*container["lifecycle"]["preStop"]["exec"]["command"]]
    command[1] = "-c"  # the profile of the machine's own shell is not that of the image
    raylet = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(3)", "--node_id=ab12", "--gcs-address=h:1"]
    )
    said = tmp_path / "said"
    for name, text in {"pidof": f"echo {raylet.pid}", "ray": f'echo "$@" > {said}'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    hook = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    assert raylet.wait(timeout=30) == 0
    assert hook.wait(timeout=30) == 0
    assert "drain-node --address=h:1 --node-id=ab12 --reason=DRAIN_NODE_REASON" in said.read_text()


def test_training_fits_the_gpus_of_its_overlay(tmp_path, monkeypatch):
    """An L4 has 24 GB, of which the driver and fragments take some; see `gpu/raycluster.yaml`."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    write_corpus(tmp_path / "in", num_shards=1)
    for name in ("gpu", "multi-gpu"):
        text = rendered(name)["ConfigMap", "one4all-jobs"]["data"]["train.yaml"]
        (tmp_path / "train.yaml").write_text(text, "utf-8")
        config = load_config(TrainConfig, tmp_path / "train.yaml", source=str(tmp_path / "in"))
        plan = plan_training(config)
        assert plan.on_gpu
        assert plan.device_bytes < 20e9
        assert config.images_per_step == 128


# Kustomize


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_ignores_no_file_of_the_cluster():
    ran = subprocess.run(
        ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "cluster"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert not ran.stdout


@pytest.mark.parametrize(
    "path", sorted(KUBERNETES.rglob("kustomization.yaml")), ids=lambda p: p.parent.name
)
def test_every_file_beside_a_kustomization_is_used(path):
    text = path.read_text("utf-8")
    for file in path.parent.rglob("*"):
        if file.is_file() and file != path:
            assert str(file.relative_to(path.parent)) in text, f"nobody uses {file.name}"


def test_a_patch_or_replacement_without_a_target_is_an_error(tmp_path):
    folder = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    gpu = folder / "overlays" / "gpu"
    patch = gpu / "rayjobs.yaml"
    good = patch.read_text("utf-8")
    for bad in (
        good.replace("workerGroupSpecs/0", "workerGroupSpecs/1"),
        good.replace("maxReplicas", "maxReplica"),
    ):
        patch.write_text(bad, "utf-8")
        with pytest.raises((AssertionError, LookupError)):
            render(gpu)
    patch.write_text(good, "utf-8")
    base = folder / "base" / "kustomization.yaml"
    base.write_text(base.read_text("utf-8").replace("data.CORPUS", "data.CORPSE"), "utf-8")
    with pytest.raises(LookupError):
        render(gpu)


def test_field_paths_are_split_as_kustomize_splits_them():
    assert split_field_path("metadata.annotations.[a.b/c]") == ["metadata", "annotations", "a.b/c"]
    assert split_field_path("spec.containers.0.args.7") == ["spec", "containers", "0", "args", "7"]


def test_the_settings_reach_every_place(overlay):
    [lines] = [
        (KUBERNETES / "base" / "settings.env").read_text("utf-8").splitlines(),
    ]
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    text = json.dumps(list(overlay.values()))
    for name, value in settings.items():
        assert "CHANGE-ME" in value
        assert value in text
        assert not re.search(rf"\b{name}\b", text), f"{name} was not replaced"


def test_the_three_clusters_differ_only_in_size():
    base = {
        path.stem: load(KUBERNETES / "base" / path)[0]["spec"]
        for path in map(Path, ("raycluster.yaml", "rayjob-protect.yaml", "rayjob-train.yaml"))
    }
    specs = [spec.get("rayClusterSpec", spec) for spec in base.values()]
    for spec in specs:
        spec["autoscalerOptions"]["idleTimeoutSeconds"] = 0
        spec["workerGroupSpecs"][0]["maxReplicas"] = 0
    assert specs[0] == specs[1] == specs[2]
    for name in ("gpu", "multi-gpu", "cpu-test"):
        folder = KUBERNETES / "overlays" / name
        standing, jobs = load_patch(folder / "raycluster.yaml"), load_patch(folder / "rayjobs.yaml")
        for operation in jobs:
            operation["path"] = operation["path"].replace("/spec/rayClusterSpec/", "/spec/")
        assert standing == jobs


def test_a_selection_by_use_is_complete(overlay):
    """`kubectl apply -l 'one4all/use in (all, USE)'` starts one use, with all that it needs."""
    for (kind, _), resource in overlay.items():
        use = resource["metadata"]["labels"]["one4all/use"]
        expected = {
            "RayCluster": {"schedule"},
            "CronJob": {"schedule"},
            "RayCronJob": {"schedule"},
            "RayJob": {"protect", "train"},
        }
        assert use in expected.get(kind, {"all"})
        for pod in pod_specs(resource):
            for volume in pod.get("volumes", []):
                assert ("ConfigMap", volume["configMap"]["name"]) in overlay
            account = pod.get("serviceAccountName")
            assert account is None or ("ServiceAccount", account) in overlay


# What the files ask of the command line


def find_verb(words):
    """The verb and its words in a command of one4all; for `submit`, the verb that it submits."""
    assert Path(words[0]).name == "one4all", words
    verb, *rest = words[1:]
    if verb != "submit":
        return verb, rest
    parse(VERBS, ["submit", *rest])
    while rest[0].startswith("--"):
        assert rest[0] in ("--address", "--working-dir", "--submission-id", "--slot"), rest[0]
        rest = rest[2:]
    return rest[0], rest[1:]


def check_command(words, jobs=None):
    """The verb takes these words, and its configuration loads; ``jobs`` is /etc/one4all."""
    verb, rest = find_verb(words)
    rest = [word.replace("/srv/one4all/configs", str(ROOT / "configs")) for word in rest]
    if jobs:
        rest = [word.replace("/etc/one4all", str(jobs)) for word in rest]
    context = parse(VERBS, [verb, *rest])
    if verb not in CONFIGS:
        return None
    return load_config(CONFIGS[verb], context.params["config"], context.params["set_"])


def entrypoints(overlay):
    for (kind, name), resource in overlay.items():
        spec = resource.get("spec", {})
        if kind == "RayJob":
            yield name, shlex.split(spec["entrypoint"]), spec["rayClusterSpec"]
        elif kind == "RayCronJob":
            job = spec["jobTemplate"]
            yield name, shlex.split(job["entrypoint"]), job["rayClusterSpec"]
        elif kind == "CronJob":
            [container] = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
            yield name, container["args"], overlay["RayCluster", "one4all"]["spec"]


def test_entrypoints_are_commands_that_fit_their_cluster(overlay, tmp_path):
    for name, text in overlay["ConfigMap", "one4all-jobs"]["data"].items():
        (tmp_path / name).write_text(text, "utf-8")
    found = list(entrypoints(overlay))
    assert len(found) == 3
    for _, words, cluster in found:
        config = check_command(words, tmp_path)
        [group] = cluster["workerGroupSpecs"]
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"] or limits["cpu"] == "1"
        gpus = int(limits.get("nvidia.com/gpu", 0))
        cpus = int(limits["cpu"])
        by_cpus = cpus // config.cpus_per_worker
        workers_of_a_pod = int(gpus / config.gpus_per_worker) if gpus else by_cpus
        assert config.cpus_per_worker * workers_of_a_pod <= cpus
        assert by_cpus
        assert (gpus > 0) == (config.gpus_per_worker > 0)
        workers = getattr(config, "max_workers", config.num_workers)
        assert 0 < workers == group["maxReplicas"] * workers_of_a_pod


def test_a_wrong_verb_option_or_key_is_found(tmp_path):
    with pytest.raises(Exception, match="No such command 'portect'"):
        check_command(["one4all", "portect", "a", "b"])
    with pytest.raises(Exception, match="No such option: --wrokers"):
        check_command(["one4all", "plan", "protect", "a", "--wrokers", "3"])
    with pytest.raises(Exception, match="No such option") as error:
        check_command(["one4all", "submit", "--slot", "daily", "protect", "a", "b", "--confg", "c"])
    assert isinstance(error.value, click.ClickException) or "click" in type(error.value).__module__
    with pytest.raises(Exception, match="num_worker"):
        check_command(["one4all", "protect", "a", "b", "--set", "num_worker=2"])


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (75, 0), (1, 1), (3, 3), (130, 130)])
def test_the_cron_job_takes_a_held_lease_for_success(code, expected):
    spec = rendered("gpu")["CronJob", "one4all-protect"]["spec"]["jobTemplate"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    ran = subprocess.run(
        [*container["command"], "sh", "-c", f"exit {code}"], capture_output=True, timeout=30
    )
    assert ran.returncode == expected


def test_the_cron_job_cannot_overlap_and_knows_its_cluster():
    overlay = rendered("gpu")
    spec = overlay["CronJob", "one4all-protect"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0
    [container] = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    name = overlay["RayCluster", "one4all"]["metadata"]["name"]
    assert f"http://{name}-head-svc:8265" in container["args"]
    token = next(env for env in container["env"] if env["name"] == "RAY_AUTH_TOKEN")
    assert token["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}


def test_commands_of_the_readme_exist():
    text = (CLUSTER / "README.md").read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"^ {4,}(?:.*-- )?(one4all [^#\n]*)", text, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        check_command(shlex.split(command))
    for path in re.findall(r"\bcluster/[\w./-]*[\w/]", text):
        assert (ROOT / path).exists(), path


def test_a_layout_that_is_stated_needs_no_node_yet(monkeypatch):
    """What jobs/protect.yaml relies on: a head without CPUs, and workers that come when asked."""
    head = {"Alive": True, "Resources": {"memory": 1.0}}
    monkeypatch.setattr("ray.nodes", lambda: [head])
    assert worker_layout(8, 12, 1) == (8, 12, 1)
    assert worker_layout(12, 2, 0) == (12, 2, 0.0)


# Security and versions


def test_containers_are_confined(overlay):
    """The schemas require it of each; here only that none hides in a place they do not look at."""
    pods = [pod for resource in overlay.values() for pod in pod_specs(resource)]
    assert len(pods) >= 8
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert "hostNetwork" not in pod
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_gpu_workers_are_on_spot_nodes_and_the_head_is_not():
    for (kind, _), resource in [*rendered("gpu").items(), *rendered("multi-gpu").items()]:
        spec = resource.get("spec", {})
        spec = spec.get("rayClusterSpec", spec)
        if kind not in ("RayJob", "RayCluster"):
            continue
        head = spec["headGroupSpec"]["template"]["spec"]
        worker = spec["workerGroupSpecs"][0]["template"]["spec"]
        assert head["nodeSelector"]["karpenter.sh/capacity-type"] == "on-demand"
        assert worker["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"
        assert {toleration["key"] for toleration in worker["tolerations"]} == {
            "nvidia.com/gpu",
            "spot",
        }


SECRETS = [
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    r"-----BEGIN",
    r"(?i)(secret_access_key|session_token|password|passwd)\s*[=:]\s*\S",
    r"(?i)\b(auth_)?token\s*[=:]\s*['\"]?[A-Za-z0-9+/_-]{16,}",
    r"(?<![\w+/])(?=\S*\d)(?=\S*[A-Z])(?=\S*[a-z])[A-Za-z0-9+/]{40}(?![\w+/])",
    r"(?<!@sha256:)\b[0-9a-f]{32,}\b",
    r"(?m)^kind: Secret$",
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CLUSTER)))
def test_no_file_holds_a_secret_or_names_somebody(path):
    text = path.read_text("utf-8")
    for pattern in SECRETS:
        assert not re.search(pattern, text), pattern
    for account in re.findall(r"\b\d{12}\b", text):
        assert account == "0" * 12, "somebody's AWS account"
    for bucket in re.findall(r"s3://([^\s/\"'`]+)", text):
        assert bucket.startswith("CHANGE-ME") or bucket in ("in", "out"), bucket
    for host in re.findall(r"https?://([\w.-]+)", text):
        assert host in {
            "one4all-head-svc",
            "127.0.0.1",
            "download.pytorch.org",
            "pypi.org",
            "s3.example.com",
        }


def test_the_secret_patterns_find_secrets():
    key = "AKIA" + "ABCDEFGH" * 2
    assert re.search(SECRETS[0], key)
    assert re.search(SECRETS[2], "aws_secret_access_key = x")
    assert re.search(SECRETS[3], 'token: "' + "a1" * 10 + '"')
    assert re.search(SECRETS[4], "wJalr/Utn7" * 4)


def test_versions_are_those_of_the_project():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for path in (KUBERNETES / "base").glob("ray*.yaml"):
        assert f'rayVersion: "{pins["ray"]}"' in path.read_text("utf-8")
    tags = [
        tag
        for path in FILES
        for tag in re.findall(r"(?:one4all:|newTag: )(\d[\w.-]*)", path.read_text("utf-8"))
    ]
    assert tags
    assert {tag.removesuffix("-cuda") for tag in tags} == {project["version"]}


# Container


def instructions():
    """The Dockerfile as (instruction, rest) pairs, continued lines joined."""
    lines = [
        line
        for line in (CLUSTER / "Dockerfile").read_text("utf-8").splitlines()
        if not line.lstrip().startswith("#")
    ]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, rest = line.split(maxsplit=1)
            yield name, rest


def test_the_image_is_not_root_and_asks_for_its_base():
    found = list(instructions())
    assert found[0][0] == "ARG"
    assert re.fullmatch(r"BASE_IMAGE=docker\.io/\S+@sha256:[0-9a-f]{64}", found[0][1])
    users = [rest for name, rest in found if name == "USER"]
    assert users == ["1000:1000"]
    names = [name for name, _ in found]
    assert "RUN" not in names[names.index("USER") :]
    assert any("--uid 1000" in rest for name, rest in found if name == "RUN")
    assert not {"ADD", "ENTRYPOINT", "HEALTHCHECK"} & set(names)
    assert {rest.split("=")[0] for name, rest in found if name == "ARG"} == {
        "BASE_IMAGE",
        "TORCH_INDEX",
    }
    [environment] = [rest for name, rest in found if name == "ENV" and "PYTHONUNBUFFERED" in rest]
    assert "RAY_AUTH_MODE" not in environment


def test_the_image_has_what_ray_up_needs_and_asks_pypi_too():
    runs = [rest for name, rest in instructions() if name == "RUN"]
    packages = re.search(r"--no-install-recommends ([\w -]+)", runs[0])[1].split()
    assert {"rsync", "openssh-client", "ca-certificates"} <= set(packages)
    assert not any(" --index-url" in run for run in runs)


def test_the_image_has_what_every_verb_needs():
    [program] = [
        re.search(r'python -c "([^"]*)" > requirements.txt', rest)[1]
        for name, rest in instructions()
        if name == "RUN" and "requirements.txt" in rest
    ]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {re.match(r"[\w-]+(\[[\w,]+\])?", line)[0] for line in done.stdout.splitlines()}
    assert {
        "torch",
        "boto3",
        "typer",
        "ray[data,train]",
        "ray[default]",
        "open_clip_torch",
    } <= names
    assert not any(name.startswith("one4all") for name in names), "the wheel is installed last"


def test_the_image_copies_what_exists_and_what_the_context_lets_through():
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    patterns = [line for line in ignore if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = [line[1:] for line in patterns if line.startswith("!")]
    copied = set()
    for name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            copied |= set(rest.split()[:-1])
    assert copied == set(allowed)
    for file in copied:
        assert (ROOT / file).exists(), file
    for secret in (".env", ".aws/credentials", ".git/config", "runs/x", "cluster/aws/cluster.yaml"):
        assert not any(fnmatch.fnmatch(secret.split("/")[0], pattern) for pattern in allowed)
    dynamic = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'readme = "README.md"' in dynamic  # which is why the wheel is built with it
    assert "README.md" in copied


# AWS


@pytest.fixture
def launcher():
    return load(CLUSTER / "aws" / "cluster.yaml")[0]


@pytest.fixture(scope="session")
def launcher_schema():
    """The one in Ray's wheel, found without importing Ray."""
    [folder] = importlib.util.find_spec("ray").submodule_search_locations
    return json.loads((Path(folder) / "autoscaler" / "ray-schema.json").read_text("utf-8"))


def test_the_launcher_file_fits_the_schema_of_ray(launcher, launcher_schema):
    jsonschema.Draft7Validator(launcher_schema).validate(launcher)
    launcher["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.Draft7Validator(launcher_schema).validate(launcher)


def test_the_launcher_file_makes_sense(launcher):
    types = launcher["available_node_types"]
    assert launcher["head_node_type"] in types
    workers = {name: t for name, t in types.items() if name != launcher["head_node_type"]}
    assert sum(t["max_workers"] for t in workers.values()) <= launcher["max_workers"]
    assert all(t["min_workers"] == 0 for t in workers.values())  # an idle cluster is one small head
    assert types["head"]["resources"] == {"CPU": 0}
    for name, node in types.items():
        config = node["node_config"]
        assert "instance-profile/CHANGE-ME" in config["IamInstanceProfile"]["Arn"]
        assert config["MetadataOptions"] == {"HttpTokens": "required"}
        assert ("InstanceMarketOptions" in config) == ("spot" in name)
        assert ("GPU" in node["resources"]) == ("gpu" in name)
    assert (
        types["head"]["node_config"]["IamInstanceProfile"]
        != types["cpu-workers"]["node_config"]["IamInstanceProfile"]
    )
    [head] = [line for line in launcher["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]


@pytest.fixture
def bootstrapped(monkeypatch, tmp_path):
    """What Ray makes of a launcher file, with its own code, on an EC2 that moto plays."""
    moto = pytest.importorskip("moto", reason="moto is not installed")
    pytest.importorskip("moto.ec2", reason="moto came without its EC2")
    from ray.autoscaler._private.aws.config import bootstrap_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair to ~/.ssh
    (tmp_path / ".ssh").mkdir()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)

    with moto.mock_aws():
        yield bootstrap_aws


def open_to(ec2, groups):
    """(Port, range) of each rule of security groups that lets addresses in."""
    found = ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"]
    return {
        (rule.get("FromPort"), address["CidrIp"])
        for group in found
        for rule in group["IpPermissions"]
        for address in rule["IpRanges"]
    }


def test_ray_opens_no_port_that_the_launcher_file_does_not(launcher, bootstrapped):
    boto3 = pytest.importorskip("boto3")
    ec2 = boto3.client("ec2", region_name=launcher["provider"]["region"])
    made = ec2.create_security_group(GroupName="ours", Description="ours")["GroupId"]
    office = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}
    office["IpRanges"] = [{"CidrIp": "192.0.2.0/24"}]
    ec2.authorize_security_group_ingress(GroupId=made, IpPermissions=[office])
    for node in launcher["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"] == ["sg-00000000000000000"]
        node["node_config"]["SecurityGroupIds"] = [made]
    config = bootstrapped(launcher)
    groups = {
        group
        for node in config["available_node_types"].values()
        for group in node["node_config"]["SecurityGroupIds"]
    }
    assert groups == {made}
    assert open_to(ec2, list(groups)) == {(22, "192.0.2.0/24")}

    # Why it is not said with `IpPermissions`: Ray adds its own rule to those.
    for node in launcher["available_node_types"].values():
        del node["node_config"]["SecurityGroupIds"]
    launcher["provider"]["security_group"] = {"IpPermissions": [office]}
    head = bootstrapped(launcher)["available_node_types"]["head"]["node_config"]
    assert open_to(ec2, head["SecurityGroupIds"]) == {(22, "192.0.2.0/24"), (22, "0.0.0.0/0")}


# One machine


def environment_file():
    text = (CLUSTER / "schedule" / "protect.env.example").read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for line in lines:  # systemd and sh read the same only without quotes, spaces and expansions
        assert re.fullmatch(r"[A-Z_]+=[A-Za-z0-9:/._-]+", line), line
    return dict(line.split("=", 1) for line in lines)


def unit(name):
    parser = configparser.RawConfigParser(strict=True)
    parser.optionxform = str
    parser.read_string((CLUSTER / "schedule" / name).read_text("utf-8"))
    return parser


def test_the_service_runs_a_command_that_exists_and_takes_75_for_success():
    service = unit("one4all-protect.service")["Service"]
    words = shlex.split(service["ExecStart"])
    for name, value in environment_file().items():
        words = [word.replace(f"${{{name}}}", value) for word in words]
    assert not any("$" in word for word in words)
    check_command(words)
    assert service["SuccessExitStatus"] == "75"
    assert service["Type"] == "oneshot"
    assert service["User"] == "one4all"
    assert service["KillMode"] == "mixed"
    assert service["NoNewPrivileges"] == "yes"
    assert "PrivateDevices" not in service


def test_the_timer_catches_up_once():
    timer = unit("one4all-protect.timer")
    assert timer["Timer"]["Persistent"] == "true"
    assert timer["Install"]["WantedBy"] == "timers.target"


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (75, 0), (1, 1), (3, 3)])
def test_the_cron_line_works_in_sh_and_ends_as_the_run_does(tmp_path, code, expected):
    lines = (CLUSTER / "schedule" / "one4all.cron").read_text("utf-8").splitlines()
    assert "SHELL=/bin/sh" in lines
    [line] = [line for line in lines if line[:1].isdigit()]
    *times, user, command = line.split(maxsplit=6)
    assert (len(times), user) == (5, "one4all")
    assert "%" not in command  # cron makes it a newline
    shutil.copy(CLUSTER / "schedule" / "protect.env.example", tmp_path / "protect.env")
    program, log = tmp_path / "one4all", tmp_path / "log"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" one4all "$@"; printenv AWS_PROFILE >&2; exit {code}\n'
    )
    program.chmod(0o755)
    command = command.replace("/etc/one4all", str(tmp_path))
    command = command.replace("/opt/one4all/bin/one4all", str(program))
    command = command.replace("logger -t one4all", f"cat > {log}")
    ran = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=30)
    assert ran.returncode == expected
    assert (ran.stdout + ran.stderr == "") == (expected == 0), "cron mails whatever is printed"
    words = log.read_text().splitlines()
    settings = environment_file()
    assert words[:4] == ["one4all", "protect", settings["SOURCE"], settings["DESTINATION"]]
    assert words[-1] == settings["AWS_PROFILE"]
    assert not any(name.startswith("RAY_") for name in settings), "a local run needs none"
    check_command(words[:4])
