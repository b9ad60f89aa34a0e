"""What is deployed agrees with what the service is.

Files parse, in the program that each is for; settings and metrics exist; versions match.
"""

import http.server
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client.metrics_core import Metric

from service.metrics import ServiceMetrics
from service.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "icm-lora.json"
RULES = DEPLOY / "prometheus" / "rules.yml"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
    "gauge": ("",),
}


def run(*command: str | Path, **environment: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


def find_program(name: str) -> str:
    """Path of a program that `make test` installs; without it the test is skipped."""
    folders = [Path(sys.executable).parent, ROOT / ".cache" / "tools" / "usr" / "bin"]
    path = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"{name} is not installed: `make test` installs it, or says how")
    return path


def find_compose() -> list[str]:
    """Docker Compose, as a plugin or as the older program of its own."""
    docker = shutil.which("docker")
    if (
        docker
        and not subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    ):
        return [docker, "compose"]
    return [find_program("docker-compose")]


def read_compose() -> dict[str, Any]:
    """The compose file as YAML."""
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return compose


def read_manifest(name: str) -> dict[str, Any]:
    """One Kubernetes object."""
    manifest: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes" / f"{name}.yaml").read_text())
    return manifest


def read_dockerfile() -> str:
    """The Dockerfile with its continued lines joined."""
    return (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def list_expressions() -> Iterator[str]:
    """Every PromQL expression of the dashboard and the rules, Grafana's variables filled in."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*")
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def list_used_names() -> set[str]:
    """Names of all samples that the dashboard and the rules ask for, recorded ones left out."""
    recorded = {
        rule["record"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    used = {
        name
        for expression in list_expressions()
        for name in re.findall(r"\b(?:icm_lora|process|vllm)[_:][\w:]+", expression)
    }
    return used - recorded


def list_exported_names() -> set[str]:
    """Names of all samples that the service's registry can export."""
    families: list[Metric] = list(ServiceMetrics(redis_configured=True).registry.collect())
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def test_compose_file_is_accepted_by_docker_compose() -> None:
    run(*find_compose(), "config", "--quiet")


def test_compose_services_are_checked_limited_and_local() -> None:
    services = read_compose()["services"]
    assert set(services) == {"service", "redis", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["healthcheck"]["test"], name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), f"{name}: pin the image's version"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for condition in service.get("depends_on", {}).values():
            assert condition == {"condition": "service_healthy"}, name


def test_dockerfile_has_no_lint_warnings() -> None:
    run(find_program("hadolint"), "Dockerfile")


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_image_health_check_tells_alive_from_dead(status: int, healthy: bool) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/live" else 404)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    match = re.search(r"HEALTHCHECK.*?CMD (\[.*\])", read_dockerfile())
    assert match, "the image has no HEALTHCHECK"
    program, *arguments = json.loads(match.group(1))
    assert program == "python"
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"ICM_LORA_PORT": str(server.server_port)}
        command = [sys.executable, *arguments]
        checked = subprocess.run(command, env=environment, capture_output=True, check=False)
        server.shutdown()
    assert (checked.returncode == 0) is healthy


def test_image_runs_without_root() -> None:
    assert re.findall(r"^USER (\S+)", read_dockerfile(), re.MULTILINE)[-1] == "10001:10001"
    pod = read_manifest("deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == 10_001


def test_deployments_set_only_settings_that_exist() -> None:
    (container,) = read_manifest("deployment")["spec"]["template"]["spec"]["containers"]
    environments = {
        "compose": read_compose()["services"]["service"]["environment"],
        "kubernetes": {item["name"]: item.get("value", "") for item in container["env"]},
        "image": dict(re.findall(r"\b(ICM_LORA_\w+)=(\S+)", read_dockerfile())),
    }
    for where, environment in environments.items():
        values = {
            name.removeprefix(ENV_PREFIX).lower(): value for name, value in environment.items()
        }
        assert values, where
        Settings.model_validate(values)  # an unknown name or a wrong value is an error


def test_pods_get_the_time_that_they_need_to_stop() -> None:
    pod = read_manifest("deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {item["name"]: item.get("value") for item in container["env"]}
    delay = float(values["ICM_LORA_SHUTDOWN_DELAY_SECONDS"])
    drain = Settings.model_fields["drain_grace_seconds"].default
    assert pod["terminationGracePeriodSeconds"] > delay + drain
    assert pod["enableServiceLinks"] is False


def test_kubernetes_ports_and_labels_fit_together() -> None:
    deployment, service = read_manifest("deployment"), read_manifest("service")
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == Settings.model_fields["port"].default
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    for name in ("disruption-budget", "deployment"):
        selector = read_manifest(name)["spec"]["selector"]["matchLabels"]
        assert selector.items() <= template["metadata"]["labels"].items()
    listed = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert all((DEPLOY / "kubernetes" / name).is_file() for name in listed)


def test_prometheus_accepts_its_configuration() -> None:
    run(find_program("promtool"), "check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_alerts_fire_when_they_should() -> None:
    run(find_program("promtool"), "test", "rules", DEPLOY / "prometheus" / "rules_test.yml")


def test_dashboard_expressions_are_promql(tmp_path: Path) -> None:
    rules = [{"record": f"e{i}", "expr": expr} for i, expr in enumerate(list_expressions())]
    file = tmp_path / "expressions.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    run(find_program("promtool"), "check", "rules", file)


def test_dashboard_and_rules_use_only_metrics_that_the_service_exports() -> None:
    assert list_used_names() <= list_exported_names()


def test_dashboard_panels_use_the_provisioned_data_source() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    provisioned = DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    (source,) = yaml.safe_load(provisioned.read_text())["datasources"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert panel["datasource"]["uid"] == source["uid"], panel["title"]


def test_grafana_finds_its_dashboards_where_they_are_mounted() -> None:
    grafana = read_compose()["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    provider = DEPLOY / "grafana" / "provisioning" / "dashboards" / "icm-lora.yml"
    (folder,) = yaml.safe_load(provider.read_text())["providers"]
    assert mounts["./deploy/grafana/dashboards"] == folder["options"]["path"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder['options']['path']}/{DASHBOARD.name}"


def test_versions_agree() -> None:
    version = PROJECT["version"]
    (container,) = read_manifest("deployment")["spec"]["template"]["spec"]["containers"]
    released = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version
    assert container["image"] == f"icm-lora:{version}"
    assert read_compose()["services"]["service"]["image"] == f"icm-lora:{version}"
    assert importlib.metadata.version("icm-lora") == version


def read_pins() -> dict[str, str]:
    """Version of each package in constraints.txt, by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.partition("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in pins}


def list_required(extras: set[str]) -> dict[str, Requirement]:
    """Packages that the project needs with these extras, transitively, by canonical name."""
    found: dict[str, Requirement] = {}
    pending = [("icm-lora", extra) for extra in {"", *extras}]
    seen = set(pending)
    while pending:
        name, extra = pending.pop()
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker and not needed.marker.evaluate({"extra": extra}):
                continue
            key = canonicalize_name(needed.name)
            found[key] = needed
            for pair in {(key, ""), *((key, option) for option in needed.extras)} - seen:
                seen.add(pair)
                pending.append(pair)
    return found


def test_every_package_is_pinned_at_the_version_that_is_tested() -> None:
    pins = read_pins()
    for name in list_required({"dev", "train"}):
        assert pins[name] == importlib.metadata.version(name).partition("+")[0], name


def test_declared_ranges_admit_the_pins() -> None:
    pins = read_pins()
    extras = PROJECT["optional-dependencies"].values()
    for line in itertools.chain(PROJECT["dependencies"], *extras):
        requirement = Requirement(line)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_make_knows_its_targets() -> None:
    targets = ["demo", "test", "serve", "lint", "format", "typecheck", "bench", "train", "clean"]
    run("make", "--dry-run", *targets)
    listed = {line.split()[0] for line in run("make", "help").splitlines()}
    assert {*targets, "help"} <= listed
