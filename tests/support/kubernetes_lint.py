"""What is wrong with RayJobs and RayClusters though they pass their schemas.

    python -m tests.support.kubernetes_lint FILE...

KubeRay's operator refuses some of it after the object is there, and never says a word of the rest: a
submissionMode that it does not know brings a whole cluster up and submits nothing. The rules are those of
KubeRay 1.7.
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
    """Return a sentence with value, rule and remedy for every rule that an object breaks.

    Args:
        document: An object as parsed YAML; one that is neither a RayJob nor a RayCluster breaks none.
    """
    if not isinstance(document, Mapping) or str(document.get("kind")) not in LONGEST_NAME:
        return []
    kind, name, spec = (
        document["kind"],
        _section(document, "metadata").get("name"),
        _section(document, "spec"),
    )
    found = [*_broken_name(kind, name)]
    if kind == "RayJob":
        found += [
            *_broken_submission(spec),
            *_broken_ending(spec),
            *_broken_selection(spec),
            *_broken_runtime(spec),
        ]
        found += _broken_ports(_section(spec, "submitterPodTemplate"), "spec.submitterPodTemplate")
        if "rayClusterSpec" in spec:
            found += _broken_cluster(_section(spec, "rayClusterSpec"), "spec.rayClusterSpec")
    else:
        found += _broken_cluster(spec, "spec")
    return [f"{kind}/{name}: {problem}" for problem in found]


def _broken_name(kind: str, name: Any) -> Iterator[str]:
    if not isinstance(name, str):
        yield f"metadata.name={name!r} is no name; give one, since others are built from it"
        return
    longest = LONGEST_NAME[kind]
    if len(name) > longest:
        yield (
            f"metadata.name={name} has {len(name)} characters, and a {kind} has at most {longest}, because "
            "KubeRay adds to it; shorten it"
        )
    if not _DNS_1035.fullmatch(name):
        yield (
            f"metadata.name={name} is no DNS-1035 label; start with a lower-case letter, go on with "
            "lower-case letters, digits and dashes, and end with no dash"
        )


def _broken_submission(spec: Mapping[str, Any]) -> Iterator[str]:
    mode = spec.get("submissionMode", SUBMISSION_MODES[0])
    if mode not in SUBMISSION_MODES:
        yield (
            f"spec.submissionMode={mode} is accepted, brings up the cluster and submits nothing; use "
            f"{', '.join(SUBMISSION_MODES)}"
        )
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield (
            "spec.submissionMode=SidecarMode does not go with submitterPodTemplate and submitterConfig, "
            "since the head's pod submits; leave them out"
        )
    if mode == "InteractiveMode" and _number(spec, "backoffLimit") > 0:
        yield (
            f"spec.backoffLimit={spec['backoffLimit']} does not go with submissionMode=InteractiveMode; "
            "leave it out"
        )


def _broken_ending(spec: Mapping[str, Any]) -> Iterator[str]:
    shutdown = spec.get("shutdownAfterJobFinishes") is True
    rules = _section(spec, "deletionStrategy").get("deletionRules")
    if _number(spec, "ttlSecondsAfterFinished") > 0 and not shutdown:
        yield (
            f"spec.ttlSecondsAfterFinished={spec['ttlSecondsAfterFinished']} needs shutdownAfterJobFinishes: "
            "true; set it, or remove the TTL"
        )
    if isinstance(rules, list) and rules and shutdown:
        yield (
            f"spec.deletionStrategy.deletionRules ({len(rules)} of them) does not go with "
            "shutdownAfterJobFinishes: true, which also says what is deleted; keep one of the two"
        )
    if spec.get("suspend") is True and not shutdown:
        yield ("spec.suspend=true needs shutdownAfterJobFinishes: true; set it (Kueue sets suspend)")
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if field in spec and _number(spec, field) <= 0:
            yield f"spec.{field}={spec[field]} is no time; give seconds above 0, or leave it out"


def _broken_selection(spec: Mapping[str, Any]) -> Iterator[str]:
    selector = spec.get("clusterSelector")
    if selector and _number(spec, "backoffLimit") > 0:
        yield (
            f"spec.backoffLimit={spec['backoffLimit']} does not go with clusterSelector: a retry is a new "
            "cluster, and this job uses one that is there; leave one of the two out"
        )
    if not selector and "rayClusterSpec" not in spec:
        yield "spec has neither rayClusterSpec nor clusterSelector, so there is no cluster; give one of them"


def _broken_runtime(spec: Mapping[str, Any]) -> Iterator[str]:
    text = spec.get("runtimeEnvYAML")
    if text is None:
        return
    try:
        value = yaml.safe_load(text) if isinstance(text, str) else None
    except yaml.YAMLError as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        yield f"spec.runtimeEnvYAML={text[:40]!r} is no YAML ({reason}); correct it"
        return
    if text and not isinstance(value, dict):
        yield f"spec.runtimeEnvYAML={str(text)[:40]!r} is no mapping; write keys such as env_vars:"


def _broken_cluster(cluster: Mapping[str, Any], at: str) -> Iterator[str]:
    yield from _broken_token(cluster, at)
    groups = [("headGroupSpec", _section(cluster, "headGroupSpec"))]
    groups += [
        (f"workerGroupSpecs[{number}]", group) for number, group in _mappings(cluster, "workerGroupSpecs")
    ]
    for place, group in groups:
        yield from _broken_resources(group, f"{at}.{place}")
        yield from _broken_ports(_section(group, "template"), f"{at}.{place}.template")
        if place != "headGroupSpec":
            yield from _broken_replicas(group, f"{at}.{place}")


def _broken_token(cluster: Mapping[str, Any], at: str) -> Iterator[str]:
    if _section(cluster, "authOptions").get("mode") != "token":
        return
    version = str(cluster.get("rayVersion", ""))
    found = re.match(r"(\d+)\.(\d+)", version)
    least = ".".join(map(str, FIRST_RAY_WITH_TOKENS))
    if not found:
        yield (
            f"{at}.rayVersion={version or 'missing'} with authOptions.mode=token: KubeRay must know that it "
            f"is {least} or later; write the image's version"
        )
    elif tuple(map(int, found.groups())) < FIRST_RAY_WITH_TOKENS:
        yield (
            f"{at}.rayVersion={version} knows no tokens, and authOptions.mode=token needs {least} or later; "
            "use a newer image and its version, or mode: disabled"
        )


def _broken_resources(group: Mapping[str, Any], at: str) -> Iterator[str]:
    named = [name for name in _RESOURCE_PARAMETERS if name in _section(group, "rayStartParams")]
    if named and group.get("resources"):
        yield (
            f"{at} has {', '.join(named)} in rayStartParams and resources={group['resources']}; "
            "KubeRay takes one of the two: keep either"
        )


def _broken_replicas(group: Mapping[str, Any], at: str) -> Iterator[str]:
    missing = [name for name in ("minReplicas", "maxReplicas") if name not in group]
    if missing:
        yield (
            f"{at} has no {' and no '.join(missing)}, whose defaults are 0 and 2147483647; write both, equal "
            "to replicas where the number of workers is fixed"
        )
        return
    least, most = _number(group, "minReplicas"), _number(group, "maxReplicas")
    if least > most:
        yield f"{at}.minReplicas={least} is above maxReplicas={most}; lower one or raise the other"
    elif "replicas" in group and not least <= _number(group, "replicas") <= most:
        yield (
            f"{at}.replicas={group['replicas']} is outside minReplicas={least} to maxReplicas={most}, where "
            "KubeRay would move it; write a number between them"
        )


def _broken_ports(template: Mapping[str, Any], at: str) -> Iterator[str]:
    for field in ("containers", "initContainers"):
        for _, container in _mappings(_section(template, "spec"), field):
            for _, port in _mappings(container, "ports"):
                name = str(port.get("name", ""))
                if len(name) > LONGEST_PORT_NAME:
                    yield (
                        f"{at}.spec.{field}: port name {name} of {container.get('name')} has {len(name)} "
                        f"characters, and no pod is made with more than {LONGEST_PORT_NAME}; shorten it"
                    )


def _section(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


def _mappings(value: Mapping[str, Any], key: str) -> list[tuple[int, Mapping[str, Any]]]:
    """Return place and value of a list's mappings; what else is in it is the schema's business."""
    found = value.get(key)
    each = enumerate(found) if isinstance(found, list) else ()
    return [(number, item) for number, item in each if isinstance(item, Mapping)]


def _number(value: Mapping[str, Any], key: str) -> int:
    """Return an integer; what is none is the schema's business, and counts as 0."""
    found = value.get(key, 0)
    return found if isinstance(found, int) else 0


def lint(text: str) -> list[str]:
    """Return what is wrong with the objects of a YAML stream.

    Raises:
        yaml.YAMLError: The text is no YAML.
    """
    return [problem for document in yaml.safe_load_all(text) for problem in problems_of(document)]


def main(arguments: Sequence[str]) -> int:
    """Lint files, - for stdin; return 0, or 2 where something is wrong."""
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
