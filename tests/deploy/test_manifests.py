"""The Dockerfile and the manifests in ``deploy/``: linted, valid by Kubernetes' schemas, and in step with the code."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
BASES = sorted(path.parent for path in KUBERNETES.glob("*/kustomization.yaml"))


def resources() -> list[tuple[str, dict[str, Any]]]:
    files = [path for base in BASES for path in sorted(base.glob("*.yaml")) if path.name != "kustomization.yaml"]
    return [(str(path.relative_to(ROOT)), one) for path in files for one in yaml.safe_load_all(path.read_text())]


def of_kind(base: str, kind: str) -> dict[str, Any]:
    (found,) = (one for path, one in resources() if f"/{base}/" in path and one["kind"] == kind)
    return found


def test_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint isn't installed: the Dockerfile isn't linted")
    done = subprocess.run(
        [hadolint, "--no-color", "-"], input=(ROOT / "Dockerfile").read_text(), text=True, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_finds_what_is_wrong() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint isn't installed: the Dockerfile isn't linted")
    done = subprocess.run(
        [hadolint, "-"], input="FROM python\nRUN cd /x && apt-get install y\n", text=True, capture_output=True
    )
    assert done.returncode == 1


def test_dockerfile_copies_every_room_and_the_context_lets_it_in() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    rooms = set(re.findall(r'^"excise[.a-z]*" = "(\w+)"$', settings, re.MULTILINE))
    copied = set(re.findall(r"^COPY (\w+) \w+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert copied == rooms
    let_in = set(re.findall(r"^!(\w+)/$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert let_in == rooms


def test_dockerfile_has_its_stages() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {"excise-build", "excise-serve", "excise-embedded"} < set(stages)
    served = (ROOT / "Dockerfile").read_text().partition(" AS excise-serve\n")[2].partition("\nFROM ")[0]
    assert "find_spec('torch') is None" in served
    assert not re.search(r"\[(edit|export|eval|all)", served)


@pytest.mark.parametrize(("path", "resource"), resources(), ids=[f"{p}" for p, _ in resources()])
def test_manifests_are_valid_kubernetes(path: str, resource: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate isn't installed")
    validate.validate(resource, validate.latest_version(), strict=True)


def test_the_validator_finds_what_is_wrong() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate isn't installed")
    broken = of_kind("triton", "Deployment")
    broken["spec"]["replica"] = 2
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, validate.latest_version(), strict=True)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_kustomizations_name_every_file(base: Path) -> None:
    document = yaml.safe_load((base / "kustomization.yaml").read_text())
    others = {path.name for path in base.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(document["resources"]) == others
    images = {image["name"] for image in document["images"]}
    containers = of_kind(base.name, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert {container["image"] for container in containers} == images


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_selectors_ports_and_targets_fit(base: Path) -> None:
    deployment = of_kind(base.name, "Deployment")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    service = of_kind(base.name, "Service")
    assert service["spec"]["selector"].items() <= labels.items()
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert of_kind(base.name, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    scaled = of_kind(base.name, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", deployment["metadata"]["name"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_autoscalers_ask_for_metrics_that_the_adapter_offers() -> None:
    rules = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    offered = {rule["name"]["as"] for rule in rules}
    asked = {
        metric["pods"]["metric"]["name"]
        for base in BASES
        for metric in of_kind(base.name, "HorizontalPodAutoscaler")["spec"]["metrics"]
    }
    assert asked == offered
    # the embedded server's own metric exists under that name
    served = (ROOT / "serve" / "http_metrics.py").read_text()
    assert '"excise_queue_waiting"' in served


def options_of(command: str) -> set[str]:
    """The options that ``excise serve run`` declares, read from its source: no import is needed."""
    tree = ast.parse((ROOT / "core" / "cli_serve.py").read_text())
    found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {option for option in found if option.startswith("--")}


def test_servers_are_started_with_options_that_exist() -> None:
    commands = [of_kind("embedded", "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]]
    service = yaml.safe_load((ROOT / "deploy" / "kserve" / "inferenceservice.yaml").read_text())
    commands.append(service["spec"]["predictor"]["containers"][0]["args"])
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    commands.append(compose["services"]["embedded"]["command"])
    known = options_of("run")
    for command in commands:
        given = {word for word in command if word.startswith("--")}
        assert given <= known, command
        assert "--host" in given, "a container that listens on its own loopback serves nobody"


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_pods_may_finish_what_they_took(base: Path) -> None:
    pod = of_kind(base.name, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = [*container.get("args", []), *(ROOT / "Dockerfile").read_text().replace('"', "").replace("=", " ").split()]
    option = "--drain-timeout" if base.name == "embedded" else "--exit-timeout-secs"
    drain = int(words[words.index(option) + 1].rstrip("],"))
    stops_after = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > drain + stops_after


def test_compose_services_fit_the_dockerfile() -> None:
    document = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for service in document["services"].values():
        if "build" in service:
            assert service["build"]["target"] in stages
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), (
            "nothing is open to the network by default"
        )
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus.yaml").read_text())["scrape_configs"]
    hosts = {target.partition(":")[0] for job in scraped for one in job["static_configs"] for target in one["targets"]}
    assert hosts <= set(document["services"])


def test_kserve_speaks_the_ports_that_it_is_probed_on() -> None:
    service = yaml.safe_load((ROOT / "deploy" / "kserve" / "inferenceservice.yaml").read_text())
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    (container,) = service["spec"]["predictor"]["containers"]
    assert container["name"] == "kserve-container", "the name that KServe looks for"
    (port,) = container["ports"]
    assert container["args"][container["args"].index("--port") + 1] == str(port["containerPort"])
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port["containerPort"]
