"""The Helm chart: that what it renders fits together, and fits the service."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from chart import CASES, MINIMAL, Object, case, environment, only, pod, rendered
from seqloss import cli
from seqloss.metrics import Metrics
from seqloss.settings import Settings, load_settings

pytestmark = pytest.mark.deploy

KEDA = "autoscaling: {enabled: true, serverAddress: 'http://prometheus:9090'}"


@pytest.fixture(params=CASES)
def said(request: pytest.FixtureRequest) -> Object:
    """Each example, and everything at once."""
    return case(request.param)


def container(said: Object) -> Object:
    (one,) = pod(said)["containers"]
    return dict(one)


def settings(said: Object, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the service itself makes of the environment of its container."""
    for name, value in environment(said).items():
        monkeypatch.setenv(name, value)
    return load_settings()


def test_the_service_takes_its_environment(said: Object, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses variables that it does not know, and values out of bounds."""
    taken = settings(said, monkeypatch)
    for name, value in said["given"].get("settings", {}).items():
        assert getattr(taken, name) == (tuple(value) if isinstance(value, list) else value), name
    assert taken.log_format == "json"


def test_settings_of_every_kind_arrive_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helm reads numbers as floats, and would write large ones with an exponent."""
    given: dict[str, Any] = {
        "max_queue_tokens": 20_000_000,
        "max_body_bytes": 2**31,
        "max_block_ms": 0.125,
        "max_forward_seconds": 1e-7,
        "drain_delay_seconds": 7.5,
        "warm_up": False,
        "log_requests": True,
        "streams": ["news", "web"],
        "cors_origins": [],
        "device": "cuda:1",
        "threads": 3,
    }
    taken = settings(rendered(MINIMAL, json.dumps({"settings": given})), monkeypatch)
    assert {name: getattr(taken, name) for name in given} == {
        **given,
        "streams": ("news", "web"),
        "cors_origins": (),
    }


def test_arguments_name_the_models(said: Object) -> None:
    """For the parser of the real command."""
    one = container(said)
    program, *command = one["command"]
    assert program == "seqloss"
    options = cli._parser().parse_args([*command, *one["args"]])
    named = {name: str(folder) for name, folder in cli._named(options.bundles).items()}
    assert options.command == "serve"
    assert named == said["given"]["bundles"]


def test_ports_agree(said: Object, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, one = settings(said, monkeypatch), container(said)
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    assert ports == {"http": taken.port, "admin": taken.admin_port}
    assert {taken.host, taken.admin_host} == {said["defaults"]["listenHost"]}
    for probe, path in (
        ("startupProbe", "/health/ready"),
        ("readinessProbe", "/health/ready"),
        ("livenessProbe", "/health/live"),
    ):
        assert one[probe]["httpGet"] == {"path": path, "port": "admin"}
    (http,) = only(said, "Service")["spec"]["ports"]
    (admin,) = only(said, "Service", "-metrics")["spec"]["ports"]
    assert (http["targetPort"], admin["targetPort"]) == ("http", "admin")
    assert http["appProtocol"] == ("https" if taken.tls_certificate_file else "http")


def test_other_ports_move_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = rendered(
        MINIMAL,
        "{ports: {http: 9000, admin: 9001}, service: {port: 80}, "
        "networkPolicy: {adminFrom: [{podSelector: {}}]}}",
    )
    taken = settings(moved, monkeypatch)
    assert (taken.port, taken.admin_port) == (9000, 9001)
    assert [port["containerPort"] for port in container(moved)["ports"]] == [9000, 9001]
    rules = only(moved, "NetworkPolicy")["spec"]["ingress"]
    assert [rule["ports"][0]["port"] for rule in rules] == [9000, 9001]
    assert only(moved, "Service")["spec"]["ports"][0]["port"] == 80


def test_selectors_find_the_pods(said: Object) -> None:
    deployment = only(said, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    wanted = deployment["spec"]["selector"]["matchLabels"].items()
    assert wanted <= labels
    assert only(said, "Service")["spec"]["selector"].items() == wanted
    assert only(said, "Service", "-metrics")["spec"]["selector"].items() == wanted
    assert only(said, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() == wanted
    assert only(said, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() == wanted
    for constraint in pod(said)["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"].items() == wanted


def test_a_service_monitor_finds_one_service_and_its_port() -> None:
    said = case("everything")
    spec = only(said, "ServiceMonitor")["spec"]
    wanted = spec["selector"]["matchLabels"].items()
    services = [one for one in said["objects"] if one["kind"] == "Service"]
    (found,) = (one for one in services if wanted <= one["metadata"]["labels"].items())
    assert found["metadata"]["name"] == "demo-seqloss-metrics"
    assert spec["endpoints"][0]["port"] in {port["name"] for port in found["spec"]["ports"]}
    assert found["metadata"]["labels"][spec["jobLabel"]] == "seqloss"


def test_labels_for_one_object_go_before_those_for_all() -> None:
    said = case("everything")
    template = only(said, "Deployment")["spec"]["template"]
    labelled = [template, only(said, "ServiceMonitor"), only(said, "Service")]
    assert [one["metadata"]["labels"]["team"] for one in labelled] == ["pods", "watch", "mt"]


def test_an_ingress_leads_to_the_service() -> None:
    said = case("public")
    (rule,) = only(said, "Ingress")["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    service = only(said, "Service")
    assert backend["name"] == service["metadata"]["name"]
    assert backend["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}


def test_images_have_a_tag_that_stays(said: Object) -> None:
    spec = pod(said)
    images = [one["image"] for one in spec["containers"] + spec.get("initContainers", [])]
    for image in images:
        assert re.search(r"(@sha256:[0-9a-f]{64}|:(?!latest$)[\w.-]+)$", image), image


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ("{}", 10 + 30 + 15),
        ("settings: {drain_delay_seconds: 2.5, drain_timeout_seconds: 120}", 3 + 120 + 15),
        ("{preStopSleepSeconds: 20, terminationMarginSeconds: 30}", 20 + 10 + 30 + 30),
        ("settings: {drain_delay_seconds: 0, drain_timeout_seconds: 0}", 15),
        ("settings: {drain_delay_seconds: null, drain_timeout_seconds: null}", 0 + 30 + 15),
    ],
    ids=["defaults", "parts of a second", "preStop", "no drain", "the service's own defaults"],
)
def test_the_grace_period_is_what_ending_may_take(
    values: str, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = rendered(MINIMAL, values)
    taken, spec = settings(said, monkeypatch), pod(said)
    sleep = container(said).get("lifecycle", {}).get("preStop", {}).get("sleep", {"seconds": 0})
    assert spec["terminationGracePeriodSeconds"] == seconds
    margin = seconds - sleep["seconds"] - math.ceil(taken.drain_delay_seconds)
    assert margin - taken.drain_timeout_seconds >= 15


def test_loading_may_take_what_was_given() -> None:
    said = rendered(MINIMAL, "probes: {startup: {seconds: 1801, periodSeconds: 10}}")
    probe = container(said)["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 1810
    # A rollout must not be given up before a pod is.
    assert only(said, "Deployment")["spec"]["progressDeadlineSeconds"] > 1810


def test_pods_have_no_rights(said: Object) -> None:
    """What the Pod Security Standard `restricted` asks for, and more."""
    spec = pod(said)
    assert spec["enableServiceLinks"] is False
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for one in spec["containers"] + spec.get("initContainers", []):
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "tmp" in {mount["name"] for mount in one["volumeMounts"]}


def test_files_lie_on_volumes_that_are_mounted(
    said: Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, one = settings(said, monkeypatch), container(said)
    volumes = {volume["name"]: volume for volume in pod(said)["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in one["volumeMounts"]}
    assert len(mounts) == len(one["volumeMounts"])
    assert {mount["name"] for mount in mounts.values()} == volumes.keys()
    for folder in said["given"]["bundles"].values():
        (mount,) = (mounts[path] for path in mounts if folder.startswith(f"{path}/"))
        assert mount["readOnly"] is True
    files = {
        "keys": [taken.api_keys_file],
        "tls": [taken.tls_certificate_file, taken.tls_key_file],
    }
    for name, paths in files.items():
        for path in filter(None, paths):
            assert mounts[str(path.parent)]["name"] == name
            # Of the group that the pod's fsGroup is, and nobody else's.
            assert volumes[name]["secret"]["defaultMode"] == 0o440
    if taken.api_keys_file:
        (item,) = volumes["keys"]["secret"]["items"]
        assert item["path"] == taken.api_keys_file.name


def test_bundles_are_fetched_into_what_is_then_read_only() -> None:
    said = case("fetch")
    (fetch,) = pod(said)["initContainers"]
    path = {mount["name"]: mount for mount in fetch["volumeMounts"]}["bundles"]
    assert path == {"name": "bundles", "mountPath": "/bundles"}
    volumes = {volume["name"]: volume for volume in pod(said)["volumes"]}
    assert volumes["bundles"] == {"name": "bundles", "emptyDir": {"sizeLimit": "4Gi"}}


@pytest.mark.parametrize(
    ("values", "source"),
    [
        ("resources: {limits: {cpu: 4}, requests: {cpu: 2}}", "limits.cpu"),
        ("resources: {requests: {cpu: 500m}}", "requests.cpu"),
        ("resources: {limits: {memory: 1Gi}}", None),
        ("{resources: {limits: {cpu: 4}}, settings: {threads: 2}}", None),
    ],
)
def test_threads_are_as_many_as_cpus(values: str, source: str | None) -> None:
    variables = {one["name"]: one for one in container(rendered(MINIMAL, values))["env"]}
    reference = variables.get("SEQLOSS_THREADS", {}).get("valueFrom", {}).get("resourceFieldRef")
    assert (reference and reference["resource"]) == source


def test_the_network_is_closed_but_for_who_is_named() -> None:
    spec = only(rendered(MINIMAL), "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["egress"] == []
    (rule,) = spec["ingress"]
    assert rule == {
        "from": [{"podSelector": {}}],
        "ports": [{"port": 8000, "protocol": "TCP"}],
    }
    nobody = only(rendered(MINIMAL, "networkPolicy: {httpFrom: []}"), "NetworkPolicy")["spec"]
    assert nobody["ingress"] == []
    rules = only(case("autoscaling"), "NetworkPolicy")["spec"]
    assert all(rule["from"] for rule in rules["ingress"])
    assert [port["port"] for rule in rules["egress"] for port in rule["ports"]] == [4318, 53, 53]


def test_keda_adds_replicas_by_what_waits() -> None:
    said = rendered(
        MINIMAL, KEDA, "autoscaling: {tokensPerSecond: 15000, acceptableWaitSeconds: 4}"
    )
    queue, busy = only(said, "ScaledObject")["spec"]["triggers"]
    assert queue["metadata"]["threshold"] == "60000"
    assert busy["metadata"]["threshold"] == "1"
    assert "replicas" not in only(said, "Deployment")["spec"]
    assert only(rendered(MINIMAL), "Deployment")["spec"]["replicas"] == 1
    target = only(said, "ScaledObject")["spec"]["scaleTargetRef"]
    assert target["name"] == only(said, "Deployment")["metadata"]["name"]


def test_keda_asks_for_series_that_the_service_has() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    known = {family.name + end for family in registry.collect() for end in ("", "_sum")}
    triggers = only(rendered(MINIMAL, KEDA), "ScaledObject")["spec"]["triggers"]
    for trigger in triggers:
        (name,) = re.findall(r"seqloss_\w+(?=\{)", trigger["metadata"]["query"])
        assert name in known
        assert 'namespace="prod",service="demo-seqloss-metrics"' in trigger["metadata"]["query"]
