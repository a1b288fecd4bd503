"""As much of kustomize as cluster/kubernetes uses: its overlays are tested where no kubectl is.

Strict where kustomize is lenient: a key that is not handled here, a patch or a replacement that
finds no target, and a path that leads nowhere are errors. `test_kubectl_renders_the_same` holds it
against the real one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]
_CLUSTER_WIDE = ("Namespace",)
_LOCAL = "config.kubernetes.io/local-config"
_KEYS = {
    "apiVersion", "kind", "namespace", "resources", "generatorOptions", "configMapGenerator",
    "patches", "images", "replacements",
}  # fmt: skip


def load(path: Path) -> list[Resource]:
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def render(folder: Path) -> list[Resource]:
    """What `kubectl kustomize folder` prints, in no particular order."""
    return [
        resource
        for resource in _build(folder)
        if resource["metadata"].get("annotations", {}).get(_LOCAL) != "true"
    ]


def _build(folder: Path) -> list[Resource]:
    [kustomization] = load(folder / "kustomization.yaml")
    assert not kustomization.keys() - _KEYS, f"not handled here: {kustomization.keys() - _KEYS}"
    resources: list[Resource] = []
    for name in kustomization["resources"]:
        path = folder / name
        resources += _build(path) if path.is_dir() else load(path)
    for generator in kustomization.get("configMapGenerator", []):
        _generate(resources, generator, kustomization["generatorOptions"], folder)
    for patch in kustomization.get("patches", []):
        _patch(resources, load_patch(folder / patch["path"]), patch.get("target"))
    for resource in resources:
        if "namespace" in kustomization and resource["kind"] not in _CLUSTER_WIDE:
            resource["metadata"]["namespace"] = kustomization["namespace"]
    for image in kustomization.get("images", []):
        assert _set_images(resources, image), f"no container has the image {image['name']}"
    for replacement in kustomization.get("replacements", []):
        _replace(resources, replacement)
    return resources


def load_patch(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def _generate(
    resources: list[Resource], generator: dict[str, Any], options: dict[str, Any], folder: Path
) -> None:
    assert options["disableNameSuffixHash"], "names with a hash are not handled here"
    data = {
        Path(file).name: (folder / file).read_text("utf-8") for file in generator.get("files", [])
    }
    for file in generator.get("envs", []):
        lines = (folder / file).read_text("utf-8").splitlines()
        data |= dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    if generator.get("behavior") == "merge":
        _one(resources, {"kind": "ConfigMap", "name": generator["name"]})["data"].update(data)
        return
    metadata: dict[str, Any] = {"name": generator["name"]}
    for key in ("labels", "annotations"):
        merged = options.get(key, {}) | generator.get("options", {}).get(key, {})
        if merged:
            metadata[key] = merged
    resources.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def _patch(resources: list[Resource], patch: Any, target: dict[str, str] | None) -> None:
    if isinstance(patch, dict):
        assert patch.get("$patch") == "delete", "of merge patches only deletion is handled here"
        name = {"kind": patch["kind"], "name": patch["metadata"]["name"]}
        resources.remove(_one(resources, name))
        return
    assert target, "a JSON patch needs a target"
    chosen = [resource for resource in resources if _matches(resource, target)]
    assert chosen, f"no resource is {target}"
    for resource in chosen:
        for operation in patch:
            _apply(resource, operation)


def _apply(resource: Resource, operation: dict[str, Any]) -> None:
    """One operation of RFC 6902."""
    *parents, last = [
        part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
    ]
    node = _walk(resource, parents)
    assert isinstance(node, dict), f"{operation['path']}: members of lists are not handled here"
    if operation["op"] == "replace":
        assert last in node, f"{operation['path']} is not there to be replaced"
    else:
        assert operation["op"] == "add", f"{operation['op']} is not handled here"
        assert last not in node, f"{operation['path']} is there already: say replace"
    node[last] = copy.deepcopy(operation["value"])


def _walk(node: Any, path: list[str]) -> Any:
    for part in path:
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def _set_images(node: Any, image: dict[str, str]) -> int:
    if isinstance(node, list):
        return sum(_set_images(member, image) for member in node)
    if not isinstance(node, dict):
        return 0
    count = 0
    for container in node.get("containers", []):
        if container.get("image") == image["name"]:
            container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
            count += 1
    return count + sum(_set_images(value, image) for value in node.values())


def _replace(resources: list[Resource], replacement: dict[str, Any]) -> None:
    source = replacement["source"]
    value = _walk(_one(resources, source), split_field_path(source["fieldPath"]))
    for target in replacement["targets"]:
        resource = _one(resources, target["select"])
        for field_path in target["fieldPaths"]:
            *parents, last = split_field_path(field_path)
            node = _walk(resource, parents)
            key: Any = int(last) if isinstance(node, list) else last
            old = node[key]
            new = copy.deepcopy(value)
            if options := target.get("options"):
                words = old.split(options["delimiter"])
                words[options["index"]] = new
                new = options["delimiter"].join(words)
            node[key] = new


def split_field_path(path: str) -> list[str]:
    """``a.[b.c/d].e`` -> a, b.c/d, e."""
    parts: list[str] = []
    for index, piece in enumerate(path.replace("]", "[").split("[")):
        parts += [piece] if index % 2 else [part for part in piece.split(".") if part]
    return parts


def _one(resources: list[Resource], target: dict[str, str]) -> Resource:
    chosen = [resource for resource in resources if _matches(resource, target)]
    assert len(chosen) == 1, f"{len(chosen)} resources are {target}"
    return chosen[0]


def _matches(resource: Resource, target: dict[str, str]) -> bool:
    return resource["kind"] == target["kind"] and target.get("name") in (
        None,
        resource["metadata"]["name"],
    )
