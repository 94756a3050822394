"""The Helm chart: what Helm, Kubernetes and a linter say of it, and which values are refused.

Kubernetes' own objects are held against its published schemas, unknown fields refused. KEDA's and
the Prometheus operator's have none at hand here: their fields are listed below.
"""

from __future__ import annotations

import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from chart import CASES, CHART, EXAMPLES, MINIMAL, case, only, rendered, tool
from seqloss import __version__
from seqloss.settings import Settings

pytestmark = pytest.mark.deploy

PAGE = (CHART.parents[2] / "docs" / "kubernetes.md").read_text()
# The oldest that Chart.yaml allows, and the newest that is known.
KUBERNETES = ("1.30", "1.37")


@pytest.mark.parametrize("name", CASES)
def test_helm_lint_finds_nothing(name: str) -> None:
    report = case(name)["lint"]
    assert report["total_charts_linted"] == 1
    assert not report["errors"]
    # A picture for the chart is all that it would like.
    assert [one["error"] for one in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", CASES)
def test_kubernetes_takes_every_object(name: str, version: str, tmp_path: Path) -> None:
    said = case(name)
    own = [one for one in said["objects"] if one["kind"] not in CUSTOM]
    assert {"Deployment", "Service", "NetworkPolicy"} <= {one["kind"] for one in own}
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text("".join(f"---\n{json.dumps(one)}\n" for one in own))
    done = tool("-m", "kubernetes_validate", "--strict", "-k", version, str(manifest))
    assert done.returncode == 0, done.stdout
    # An object without a schema is a warning, and no failure.
    assert len(re.findall(rf"passed for resource .* version {version}", done.stdout)) == len(own)


def test_kubernetes_is_the_oldest_that_the_chart_allows() -> None:
    assert rendered(MINIMAL)["chart"]["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


_TRIGGER = ("metadata.ignoreNullValues", "metadata.query", "metadata.serverAddress")
_BEHAVIOR = "advanced.horizontalPodAutoscalerConfig.behavior.scaleDown."
# What these resources have of fields, deeper ones with dots; lists are looked into.
CUSTOM = {
    "ServiceMonitor": {
        "jobLabel", "namespaceSelector.matchNames", "selector.matchLabels",
        "endpoints.port", "endpoints.path", "endpoints.interval", "endpoints.scrapeTimeout",
        "endpoints.metricRelabelings.action", "endpoints.metricRelabelings.regex",
    },
    "ScaledObject": {
        "scaleTargetRef.apiVersion", "scaleTargetRef.kind", "scaleTargetRef.name",
        "minReplicaCount", "maxReplicaCount", "pollingInterval",
        f"{_BEHAVIOR}stabilizationWindowSeconds", f"{_BEHAVIOR}policies.type",
        f"{_BEHAVIOR}policies.value", f"{_BEHAVIOR}policies.periodSeconds",
        "triggers.type", "triggers.metricType", "triggers.authenticationRef.name",
        *(f"triggers.{field}" for field in _TRIGGER),
        "triggers.metadata.threshold", "triggers.metadata.unsafeSsl",
    },
}  # fmt: skip


def fields(value: Any, path: str = "") -> set[str]:
    if isinstance(value, list):
        return set().union(*(fields(one, path) for one in value)) if value else {path}
    if not isinstance(value, dict) or path.endswith("matchLabels"):
        return {path}
    inner = (fields(one, f"{path}.{key}" if path else key) for key, one in value.items())
    return set().union(*inner)


@pytest.mark.parametrize("kind", CUSTOM)
def test_custom_resources_have_the_fields_they_should(kind: str) -> None:
    one = only(case("everything"), kind)
    assert fields(one["spec"]) == CUSTOM[kind]
    versions = {"ServiceMonitor": "monitoring.coreos.com/v1", "ScaledObject": "keda.sh/v1alpha1"}
    assert one["apiVersion"] == versions[kind]


def test_yaml_is_tidy(tmp_path: Path) -> None:
    manifests = {name: tmp_path / f"{name}.yaml" for name in CASES}
    for name, path in manifests.items():
        path.write_text(case(name)["text"])
    # Helm writes lists of its own without an indent.
    loose = "{extends: default, rules: {line-length: disable, indentation: disable}}"
    tidy = "{extends: default, rules: {line-length: {max: 100}, document-start: disable}}"
    for config, paths in (
        (loose, manifests.values()),
        (tidy, [CHART / "Chart.yaml", CHART / "values.yaml", *EXAMPLES.values()]),
    ):
        done = tool("-m", "yamllint", "--strict", "-d", config, *map(str, paths))
        assert done.returncode == 0, done.stdout


# Each with the part of Helm's answer that tells a person what to mend.
REFUSED = {
    "no bundles": ("replicas: 1", "bundles: name at least one model"),
    "a misspelt value": ("replica: 2", "'replica' not allowed"),
    "a misspelt setting": ("settings: {max_batch_token: 1}", "'max_batch_token' not allowed"),
    "a setting that the chart itself makes": ("settings: {port: 9000}", "'port' not allowed"),
    "a setting below its bound": ("settings: {max_batch_tokens: 8}", "/settings/max_batch_tokens"),
    "a number as a text": ('settings: {threads: "4"}', "/settings/threads"),
    "a relative folder": ("bundles: {demo: bundles/demo}", "/bundles/demo"),
    "a variable in a folder": ("bundles: {demo: /bundles/$(HOME)}", "/bundles/demo"),
    "a model's name with a slash": ("bundles: {a/b: /bundles/demo}", "'a/b'"),
    "two kinds of volume": (
        "bundleVolume: {source: {emptyDir: {}, hostPath: {path: /b}}}",
        "/bundleVolume/source",
    ),
    "a volume beside an init container": (
        "{bundleVolume: {source: {emptyDir: {}}}, bundleFetch: {enabled: true, image: a:1}}",
        "bundleVolume.source and bundleFetch.enabled",
    ),
    "an init container without an image": ("bundleFetch: {enabled: true}", "bundleFetch.image"),
    "an init container of any version": (
        "bundleFetch: {enabled: true, image: copy}",
        "/bundleFetch/image",
    ),
    "the tag latest": ("image: {tag: latest}", "/image/tag"),
    "a digest that is none": ("image: {digest: 'sha256:12'}", "/image/digest"),
    "settings as variables": ("extraEnv: [{name: SEQLOSS_PORT, value: '1'}]", "/extraEnv/0/name"),
    "a port that is none": ("ports: {http: 70000}", "/ports/http"),
    "one port for both": ("ports: {admin: 8000}", "ports: http and admin are the same"),
    "labels that selectors need": (
        "podLabels: {app.kubernetes.io/name: x}",
        "'app.kubernetes.io/name'",
    ),
    "a peer that is everybody": ("networkPolicy: {adminFrom: [{}]}", "/networkPolicy/adminFrom/0"),
    "an Ingress for every host": ("ingress: {enabled: true}", "ingress.hosts"),
    "no margin": ("terminationMarginSeconds: 0", "/terminationMarginSeconds"),
    "scaling to nothing": ("autoscaling: {minReplicas: 0}", "/autoscaling/minReplicas"),
    "scaling without Prometheus": ("autoscaling: {enabled: true}", "autoscaling.serverAddress"),
    "fewest above most": (
        "autoscaling: {enabled: true, serverAddress: 'http://p', minReplicas: 5}",
        "minReplicas is above maxReplicas",
    ),
    "a queue that is never so long": (
        "autoscaling: {enabled: true, serverAddress: 'http://p', acceptableWaitSeconds: 100}",
        "is 2000000, and a replica refuses requests at max_queue_tokens, 2000000",
    ),
}


@pytest.mark.parametrize(("wrong", "said"), REFUSED.values(), ids=REFUSED)
def test_wrong_values_are_refused_with_what_to_mend(wrong: str, said: str) -> None:
    given = [wrong] if "bundles: name" in said else [MINIMAL, wrong]
    assert said in rendered(*given).get("refused", "nothing was refused")


def test_every_value_has_a_place_in_the_schema_and_a_default() -> None:
    """Where values are a fixed set of names, the defaults are all of them."""
    told = rendered(MINIMAL)
    free = {"settings", "bundles", "global"}

    def compare(schema: dict[str, Any], values: dict[str, Any], path: str) -> None:
        names = schema["properties"].keys() - (free if not path else set())
        assert names == values.keys() - free, path
        for name in names:
            if "properties" in schema["properties"][name]:
                compare(schema["properties"][name], values[name], f"{path}.{name}")

    compare(told["schema"], told["defaults"], "")


# The chart makes these of other values.
OWN = {"host", "port", "admin_host", "admin_port"} | {
    "api_keys_file", "tls_certificate_file", "tls_key_file"
}  # fmt: skip


def test_settings_of_the_chart_are_those_of_the_service() -> None:
    """By name, type and bounds: whoever adds one to settings.py adds it to values.schema.json."""
    bounds = {}
    for name, field in Settings.model_json_schema()["properties"].items():
        kinds = [one for one in field.get("anyOf", [field]) if one["type"] != "null"]
        bounds[name] = {key: kinds[0][key] for key in kinds[0].keys() - {"default", "title"}}
    settings = rendered(MINIMAL)["schema"]["properties"]["settings"]
    listed = {
        name: {key: field[key] for key in field.keys() - {"description"}}
        for name, field in settings["properties"].items()
    }
    assert bounds.keys() >= OWN
    assert listed == {name: bounds[name] for name in bounds.keys() - OWN}
    assert settings["additionalProperties"] is False


def test_the_version_is_the_services() -> None:
    chart = rendered(MINIMAL)["chart"]
    assert chart["appVersion"] == __version__
    assert chart["version"] == __version__


def test_names_fit_however_long_a_release_is_called() -> None:
    said = rendered(EXAMPLES["autoscaling"].read_text(), name="r" * 53)
    names = [one["metadata"]["name"] for one in said["objects"]]
    assert len(names) == 8
    assert all(len(name) <= 63 for name in names), names
    assert len({(one["kind"], one["metadata"]["name"]) for one in said["objects"]}) == len(names)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ("{}", "there are no API keys"),
        ("networkPolicy: {enabled: false}", "there is no NetworkPolicy"),
        ("metrics: {serviceMonitor: {enabled: true}}", "lets no Prometheus in"),
        ("bundleFetch: {enabled: true, image: 'a:1'}", "fetch from mounted volumes"),
        ("settings: {traces: true}", "no trace will arrive"),
        ("{}", "no volume has bundles"),
    ],
)
def test_notes_say_what_may_be_amiss(values: str, note: str) -> None:
    assert note in rendered(MINIMAL, values)["notes"]


def test_notes_say_nothing_where_all_is_well() -> None:
    assert "NOTE" not in case("public")["notes"]


def test_the_page_names_values_that_there_are() -> None:
    """In docs/kubernetes.md `a.b` is a value where `a` is one."""
    named = re.findall(r"`([A-Za-z]+(?:\.[A-Za-z_]+)+)`", PAGE)
    defaults = rendered(MINIMAL)["defaults"]
    values = {name for name in named if name.split(".")[0] in defaults and ".yaml" not in name}
    assert len(values) > 10
    for name in values - {f"settings.{field}" for field in Settings.model_fields}:
        value = defaults
        for part in name.split("."):
            assert part in value, name
            value = value[part]


def test_the_page_shows_every_example() -> None:
    assert set(re.findall(r"^\| `(\w+)\.yaml` \|", PAGE, re.MULTILINE)) == EXAMPLES.keys()


def test_commands_of_the_page_give_values_that_are_taken() -> None:
    commands = re.findall(r"^helm (?:install|upgrade) .*", PAGE, re.MULTILINE)
    given = [re.findall(r"--set (\S+)=(\S+)", command) for command in commands]
    assert sum(map(len, given)) == 3
    for pairs in given:
        nested = [
            reduce(lambda of, part: {part: of}, name.split(".")[::-1], value)
            for name, value in pairs
        ]
        said = rendered(MINIMAL, *map(json.dumps, nested))
        assert "refused" not in said, said["refused"]
