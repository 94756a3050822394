"""What deploys the service on Ray is what Ray and the service take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private import ray_constants
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from autoscaling_context import context
from seqloss.distributed.ray_serve import Arguments, LossDeployment, application
from seqloss.settings import Settings

FOLDER = Path(__file__).parents[2] / "deploy" / "ray"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def serve_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((FOLDER / "serve.yaml").read_text())
    return config


def ray_service() -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())
    return manifest


def test_ray_takes_the_configuration() -> None:
    schema = ServeDeploySchema.model_validate(serve_config())
    [application] = schema.applications
    [deployment] = application.deployments
    assert application.import_path == "seqloss.distributed.ray_serve:application"
    assert deployment.name == LossDeployment.name


def test_the_service_takes_its_arguments() -> None:
    arguments = Arguments.model_validate(serve_config()["applications"][0]["args"])
    assert Settings(**arguments.settings).admin_port
    assert arguments.models


def test_a_replica_has_as_long_to_answer_as_a_request_may_take() -> None:
    config = serve_config()
    deployment = config["applications"][0]["deployments"][0]
    seconds = config["http_options"]["request_timeout_s"]
    assert deployment["graceful_shutdown_timeout_s"] >= seconds


def test_the_application_is_built_of_the_file() -> None:
    arguments = serve_config()["applications"][0]["args"]
    built = call_user_app_builder_with_args_if_necessary(application, arguments)
    models, settings = built._bound_deployment.init_args
    assert models == {"nllb": Path("/models/nllb-600m")}
    assert settings == arguments["settings"]


def test_the_policy_is_found_and_takes_its_arguments() -> None:
    autoscaling = serve_config()["applications"][0]["deployments"][0]["autoscaling_config"]
    policy = AutoscalingPolicy(**autoscaling["policy"])
    made = policy.get_policy()(**policy.policy_kwargs)
    assert made(context([800_001, 0], [1.0, 1.0])) == (3, {})


def test_pods_come_with_replicas() -> None:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    [group] = cluster["workerGroupSpecs"]
    autoscaling = serve_config()["applications"][0]["deployments"][0]["autoscaling_config"]
    assert cluster["enableInTreeAutoscaling"]
    assert (group["minReplicas"], group["maxReplicas"]) == (
        autoscaling["min_replicas"],
        autoscaling["max_replicas"],
    )


def test_kuberay_deploys_the_same() -> None:
    assert yaml.safe_load(ray_service()["spec"]["serveConfigV2"]) == serve_config()


def test_pods_are_of_the_version_of_ray_that_is_tested() -> None:
    pinned = re.search(r"^ray==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pinned
    assert ray_service()["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]
    assert f"rayproject/ray:{pinned[1]}-py311" in (FOLDER / "Dockerfile").read_text()


def test_a_pod_has_longer_than_its_replica() -> None:
    [group] = ray_service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    deployment = serve_config()["applications"][0]["deployments"][0]
    pod = group["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > deployment["graceful_shutdown_timeout_s"]
    ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
    assert ports["operators"] == serve_config()["applications"][0]["args"]["settings"]["admin_port"]


def test_a_cluster_that_is_replaced_lives_as_long_as_its_replicas() -> None:
    deployment = serve_config()["applications"][0]["deployments"][0]
    delay = ray_service()["spec"]["rayClusterDeletionDelaySeconds"]
    assert delay > deployment["graceful_shutdown_timeout_s"]


def test_a_machine_that_is_to_end_waits_for_its_replicas() -> None:
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert hasattr(ray_constants, name)
    [group] = ray_service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    [seconds] = [one["value"] for one in pod["containers"][0]["env"] if one["name"] == name]
    deployment = serve_config()["applications"][0]["deployments"][0]
    least, most = deployment["graceful_shutdown_timeout_s"], pod["terminationGracePeriodSeconds"]
    assert least < float(seconds) < most


@pytest.mark.parametrize(
    "arguments",
    [
        {"models": {}},
        {"models": {"a/b": "/models/a"}},
        {"models": {"a": "/models/a"}, "setting": {}},
        {"settings": {}},
    ],
)
def test_other_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"models|setting"):
        Arguments.model_validate(arguments)
