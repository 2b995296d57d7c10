"""Lint RayJobs and RayClusters for errors that their CRD schemas do not catch.

    python -m tests.support.kubernetes_lint FILE...

The KubeRay operator rejects some of them only after the object was created and ignores others: with an
unknown submissionMode it starts a cluster and submits nothing. The rules are those of KubeRay 1.7.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
LONGEST_NAME = {"RayJob": 47, "RayCluster": 53}
LONGEST_PORT_NAME = 15
FIRST_RAY_WITH_TOKENS = (2, 52)
_RESOURCE_PARAMETERS = ("num-cpus", "num-gpus", "memory", "resources")
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def problems_of(document: Any) -> list[str]:
    """Return value, rule and remedy for every rule that an object violates.

    Args:
        document: An object as parsed YAML; kinds other than RayJob and RayCluster have no rules.
    """
    if not isinstance(document, Mapping) or str(document.get("kind")) not in LONGEST_NAME:
        return []
    kind, name, spec = (
        document["kind"],
        _section(document, "metadata").get("name"),
        _section(document, "spec"),
    )
    found = [*_name_problems(kind, name)]
    if kind == "RayJob":
        found += [
            *_submission_problems(spec),
            *_ending_problems(spec),
            *_selection_problems(spec),
            *_runtime_problems(spec),
        ]
        found += _port_problems(_section(spec, "submitterPodTemplate"), "spec.submitterPodTemplate")
        if "rayClusterSpec" in spec:
            found += _cluster_problems(_section(spec, "rayClusterSpec"), "spec.rayClusterSpec")
    else:
        found += _cluster_problems(spec, "spec")
    return [f"{kind}/{name}: {problem}" for problem in found]


def _name_problems(kind: str, name: Any) -> Iterator[str]:
    if not isinstance(name, str):
        yield f"metadata.name={name!r} is not a name; set one, since other names are derived from it"
        return
    longest = LONGEST_NAME[kind]
    if len(name) > longest:
        yield (
            f"metadata.name={name} has {len(name)} characters; a {kind} name has at most {longest}, because "
            "KubeRay appends to it; shorten it"
        )
    if not _DNS_1035.fullmatch(name):
        yield (
            f"metadata.name={name} is not a DNS-1035 label; use lower-case letters, digits and dashes, start "
            "with a letter and do not end with a dash"
        )


def _submission_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    mode = spec.get("submissionMode", SUBMISSION_MODES[0])
    if mode not in SUBMISSION_MODES:
        yield (
            f"spec.submissionMode={mode} is accepted by the API server, but KubeRay then submits nothing; "
            f"use {', '.join(SUBMISSION_MODES)}"
        )
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield (
            "spec.submissionMode=SidecarMode conflicts with submitterPodTemplate and submitterConfig, "
            "since the head pod submits; remove them"
        )
    if mode == "InteractiveMode" and _number(spec, "backoffLimit") > 0:
        yield (
            f"spec.backoffLimit={spec['backoffLimit']} conflicts with submissionMode=InteractiveMode; "
            "remove it"
        )


def _ending_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    shutdown = spec.get("shutdownAfterJobFinishes") is True
    rules = _section(spec, "deletionStrategy").get("deletionRules")
    if _number(spec, "ttlSecondsAfterFinished") > 0 and not shutdown:
        yield (
            f"spec.ttlSecondsAfterFinished={spec['ttlSecondsAfterFinished']} requires "
            "shutdownAfterJobFinishes: true; set it, or remove the TTL"
        )
    if isinstance(rules, list) and rules and shutdown:
        yield (
            f"spec.deletionStrategy.deletionRules ({len(rules)} rules) conflicts with "
            "shutdownAfterJobFinishes: true; keep one of the two"
        )
    if spec.get("suspend") is True and not shutdown:
        yield ("spec.suspend=true requires shutdownAfterJobFinishes: true; set it (Kueue sets suspend)")
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if field in spec and _number(spec, field) <= 0:
            yield f"spec.{field}={spec[field]} must be above 0 seconds; change or remove it"


def _selection_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    selector = spec.get("clusterSelector")
    if selector and _number(spec, "backoffLimit") > 0:
        yield (
            f"spec.backoffLimit={spec['backoffLimit']} conflicts with clusterSelector: a retry creates a "
            "new cluster, but this job uses an existing one; remove one of the two"
        )
    if not selector and "rayClusterSpec" not in spec:
        yield "spec has neither rayClusterSpec nor clusterSelector; set one of them"


def _runtime_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    text = spec.get("runtimeEnvYAML")
    if text is None:
        return
    try:
        value = yaml.safe_load(text) if isinstance(text, str) else None
    except yaml.YAMLError as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        yield f"spec.runtimeEnvYAML={text[:40]!r} is not valid YAML ({reason}); correct it"
        return
    if text and not isinstance(value, dict):
        yield f"spec.runtimeEnvYAML={str(text)[:40]!r} is not a mapping; use keys such as env_vars:"


def _cluster_problems(cluster: Mapping[str, Any], at: str) -> Iterator[str]:
    yield from _token_problems(cluster, at)
    groups = [("headGroupSpec", _section(cluster, "headGroupSpec"))]
    groups += [
        (f"workerGroupSpecs[{number}]", group) for number, group in _mappings(cluster, "workerGroupSpecs")
    ]
    for name, group in groups:
        yield from _resource_problems(group, f"{at}.{name}")
        yield from _port_problems(_section(group, "template"), f"{at}.{name}.template")
        if name != "headGroupSpec":
            yield from _replica_problems(group, f"{at}.{name}")


def _token_problems(cluster: Mapping[str, Any], at: str) -> Iterator[str]:
    if _section(cluster, "authOptions").get("mode") != "token":
        return
    version = str(cluster.get("rayVersion", ""))
    found = re.match(r"(\d+)\.(\d+)", version)
    least = ".".join(map(str, FIRST_RAY_WITH_TOKENS))
    if not found:
        yield (
            f"{at}.rayVersion={version or 'missing'} with authOptions.mode=token: KubeRay requires {least} "
            "or later; set the Ray version of the image"
        )
    elif tuple(map(int, found.groups())) < FIRST_RAY_WITH_TOKENS:
        yield (
            f"{at}.rayVersion={version} does not support authOptions.mode=token, which requires {least} or "
            "later; use a newer image and its version, or mode: disabled"
        )


def _resource_problems(group: Mapping[str, Any], at: str) -> Iterator[str]:
    named = [name for name in _RESOURCE_PARAMETERS if name in _section(group, "rayStartParams")]
    if named and group.get("resources"):
        yield (
            f"{at} has {', '.join(named)} in rayStartParams and resources={group['resources']}; "
            "KubeRay accepts only one of the two: keep either"
        )


def _replica_problems(group: Mapping[str, Any], at: str) -> Iterator[str]:
    missing = [name for name in ("minReplicas", "maxReplicas") if name not in group]
    if missing:
        yield (
            f"{at} has no {' and no '.join(missing)}, whose defaults are 0 and 2147483647; set both, equal "
            "to replicas for a fixed number of workers"
        )
        return
    least, most = _number(group, "minReplicas"), _number(group, "maxReplicas")
    if least > most:
        yield f"{at}.minReplicas={least} is above maxReplicas={most}; lower one or raise the other"
    elif "replicas" in group and not least <= _number(group, "replicas") <= most:
        yield (
            f"{at}.replicas={group['replicas']} is outside minReplicas={least} to maxReplicas={most}, so "
            "KubeRay would change it; use a number in this range"
        )


def _port_problems(template: Mapping[str, Any], at: str) -> Iterator[str]:
    for field in ("containers", "initContainers"):
        for _, container in _mappings(_section(template, "spec"), field):
            for _, port in _mappings(container, "ports"):
                name = str(port.get("name", ""))
                if len(name) > LONGEST_PORT_NAME:
                    yield (
                        f"{at}.spec.{field}: port name {name} of {container.get('name')} has {len(name)} "
                        f"characters; the limit is {LONGEST_PORT_NAME}; shorten it"
                    )


def _section(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


def _mappings(value: Mapping[str, Any], key: str) -> list[tuple[int, Mapping[str, Any]]]:
    """Return index and value of the mappings in a list; other items are left to the schema."""
    items = value.get(key)
    numbered = enumerate(items) if isinstance(items, list) else ()
    return [(number, item) for number, item in numbered if isinstance(item, Mapping)]


def _number(value: Mapping[str, Any], key: str) -> int:
    """Return an integer, or 0 for other types, which are left to the schema."""
    found = value.get(key, 0)
    return found if isinstance(found, int) else 0


def lint(text: str) -> list[str]:
    """Return the problems of all objects of a YAML stream.

    Raises:
        yaml.YAMLError: The text is not valid YAML.
    """
    return [problem for document in yaml.safe_load_all(text) for problem in problems_of(document)]


def main(arguments: Sequence[str]) -> int:
    """Lint files (- for stdin); return 0 without and 2 with problems."""
    if not arguments:
        sys.stderr.write("usage: python -m tests.support.kubernetes_lint FILE... (- reads stdin)\n")
        return 2
    found = []
    for name in arguments:
        try:
            text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
            found += [f"{name}: {problem}" for problem in lint(text)]
        except (OSError, UnicodeDecodeError) as error:
            found.append(f"{name}: cannot be read ({error}); name a YAML file")
        except yaml.YAMLError as error:
            found.append(f"{name}: not valid YAML ({' '.join(str(error).split())}); correct it")
    for problem in found:
        sys.stderr.write(problem + "\n")
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
