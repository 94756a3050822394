"""The Helm chart, rendered by Helm's own library in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from clients_environment import python_with

Object = dict[str, Any]

_TESTS = Path(__file__).parent
_DEPLOY = _TESTS.parent / "deploy"
CHART = _DEPLOY / "helm" / "seqloss"
EXAMPLES = {path.stem: path for path in (_DEPLOY / "helm" / "examples").glob("*.yaml")}
MINIMAL = "bundles: {demo: /bundles/demo}"

# A JSON object with a list of values' texts, merged as several -f are; the objects of each file.
_RENDER = """
import functools, json, sys
import helm_python as helm, yaml

def merged(base, over):
    both = {**base}
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        both[key] = merged(base[key], value) if nested else value
    return both

asked = json.load(sys.stdin)
given = functools.reduce(merged, map(helm.values_from_yaml, asked["values"]), {})
said = {"given": given, "lint": helm.lint(asked["chart"], given, strict=True)}
with helm.Chart.load(asked["chart"]) as chart:
    said["defaults"], said["chart"], said["schema"] = chart.values, chart.metadata, chart.schema
    try:
        files = chart.render(given, name=asked["name"], namespace="prod")
    except helm.HelmError as error:
        said["refused"] = str(error)
    else:
        said["notes"] = files.pop("seqloss/templates/NOTES.txt")
        texts = [text.strip() for text in files.values() if text.strip()]
        said["text"] = "".join(f"---\\n{text}\\n" for text in texts)
        said["objects"] = list(yaml.safe_load_all(said["text"]))
print(json.dumps(said))
"""

# What no example has. The one for GPUs has its bundles from elsewhere, and stands for itself.
_MORE = """
image: {repository: seqloss, digest: "sha256:%s"}
bundleFetch: {enabled: false}
bundleVolume: {subPath: models}
preStopSleepSeconds: 5
commonLabels: {team: mt, app.kubernetes.io/component: scoring}
podLabels: {team: pods}
podAnnotations: {example.org/reason: test}
podDisruptionBudget: {minAvailable: 50%%}
imagePullSecrets: [{name: pull}]
priorityClassName: batch
service: {type: LoadBalancer, annotations: {example.org/internal: "true"}}
serviceAccount: {annotations: {example.org/role: reader}}
affinity: {nodeAffinity: {}}
extraVolumes: [{name: scratch, emptyDir: {}}]
extraVolumeMounts: [{name: scratch, mountPath: /scratch}]
autoscaling: {triggerAuthentication: prometheus, triggerMetadata: {unsafeSsl: "true"}}
metrics:
  serviceMonitor:
    labels: {team: watch}
    metricRelabelings: [{action: drop, regex: python_.*}]
""" % ("0" * 64)
CASES = [*sorted(EXAMPLES), "everything"]


def tool(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """One of the tools in their own environment."""
    requirements = _TESTS / "deploy" / "chart-requirements.txt"
    python = python_with(requirements, _TESTS.parent / "build" / "chart-venv")
    return subprocess.run(
        [python, *arguments], input=stdin, capture_output=True, text=True, check=False
    )


@cache
def rendered(*values: str, name: str = "demo") -> Object:
    """What Helm makes of values, those later on first; or why it refuses them."""
    asked = {"chart": str(CHART), "values": values, "name": name}
    done = tool("-c", _RENDER, stdin=json.dumps(asked))
    assert done.returncode == 0, done.stderr
    said: Object = json.loads(done.stdout)
    return said


def case(name: str) -> Object:
    """What an example makes; `everything` is most of them and more at once."""
    if name == "everything":
        paths = [EXAMPLES[one] for one in sorted(EXAMPLES) if one != "gpu"]
        said = rendered(*(path.read_text() for path in paths), _MORE)
    else:
        said = rendered(EXAMPLES[name].read_text())
    assert "refused" not in said, said["refused"]
    return said


def only(said: Object, kind: str, suffix: str = "") -> Object:
    """The one object of a kind, whose name ends so."""
    assert "refused" not in said, said["refused"]
    whole = f"demo-seqloss{suffix}"
    found = [
        one for one in said["objects"] if one["kind"] == kind and one["metadata"]["name"] == whole
    ]
    assert len(found) == 1, f"{len(found)} of {kind} {whole}"
    return dict(found[0])


def pod(said: Object) -> Object:
    """What the Deployment says of its pods."""
    return dict(only(said, "Deployment")["spec"]["template"]["spec"])


def environment(said: Object) -> dict[str, str]:
    """Variables of the service whose values are known before it runs."""
    (container,) = pod(said)["containers"]
    names = [one["name"] for one in container["env"]]
    assert len(set(names)) == len(names), names
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}
