"""The manifests: kustomize builds them, schemas know them, and they agree with the daemon and with one another."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import trustme
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from harness import Stage
from modules import module_at
from processes import run_cli

from ckptd.arena.budget import RESERVE_BYTES
from ckptd.config import load_settings, parse_size

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/kubernetes"
BUILDS = ("base", "overlays/example")
KUBERNETES: Final = "1.32"  # the schemas
HEADROOM_BYTES: Final = 4 << 30  # beside the slots, as the comments say
Object = dict[str, Any]


def read(path: str) -> list[Object]:
    return [found for found in yaml.safe_load_all((FOLDER / path).read_text()) if found]


@functools.cache
def build(folder: str) -> list[Object]:
    """Built once: kustomize takes seconds. Nobody changes what it gives."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is missing: apt install kubernetes-client, or kubernetes.io")
    command = ["kubectl", "kustomize", str(FOLDER / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def one(objects: list[Object], kind: str) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


def pod_of(objects: list[Object]) -> Object:
    return dict(one(objects, "DaemonSet")["spec"]["template"]["spec"])


def container_of(objects: list[Object]) -> Object:
    (found,) = pod_of(objects)["containers"]
    return dict(found)


def settings_of(objects: list[Object]) -> Object:
    return tomllib.loads(one(objects, "ConfigMap")["data"]["ckptd.toml"])


@pytest.fixture(params=BUILDS)
def built(request: pytest.FixtureRequest) -> list[Object]:
    return build(request.param)


# --- shape --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml")))
def test_every_file_is_yaml_of_one_object(path: str) -> None:
    (found,) = read(path)
    assert {"apiVersion", "kind"} <= found.keys()


def test_every_object_is_as_its_schema_says(built: list[Object]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for found in [*built, *read("examples/trainer.yaml")]:
        if not found["apiVersion"].startswith("monitoring.coreos.com/"):  # no schema of those
            validator.validate(found, KUBERNETES, strict=True)


def test_what_is_named_is_there(built: list[Object]) -> None:
    pod, container = pod_of(built), container_of(built)
    volumes = {volume["name"] for volume in pod["volumes"]}
    for each in [container, *pod["initContainers"]]:
        assert {mount["name"] for mount in each["volumeMounts"]} <= volumes
    assert pod["serviceAccountName"] == one(built, "ServiceAccount")["metadata"]["name"]
    (settings,) = [volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume]
    assert settings == one(built, "ConfigMap")["metadata"]["name"]


# --- the daemon ---------------------------------------------------------------------------------------------------
def command_of(objects: list[Object], tmp_path: Path, **environment: str) -> list[str]:
    """What the container's shell starts."""
    fake = tmp_path / "ckptd"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    container = container_of(objects)
    given = {item["name"]: item["value"] for item in container["env"] if "value" in item} | environment
    assert all(item["name"] in given for item in container["env"])
    # The kubelet makes $( of $$(, so that it is not taken for one of its own references.
    command = [*container["command"], *(text.replace("$$(", "$(") for text in container["args"])]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run(command, env=given | path, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_command_line_is_one_of_this_version(built: list[Object], tmp_path: Path) -> None:
    verb, *rest = command_of(built, tmp_path, POD_IP="10.1.2.3", POD_NAMESPACE="ckptd")
    shown = run_cli(verb, "--help", COLUMNS="200").stdout
    flags = [word for word in rest if word.startswith("--")]
    assert flags
    assert [flag for flag in flags if f"{flag} " not in shown] == []


def test_a_pod_is_advertised_by_its_name_in_the_headless_service(built: list[Object], tmp_path: Path) -> None:
    service = one(built, "Service")
    assert service["spec"]["clusterIP"] == "None"
    for address, label in (("10.1.2.3", "10-1-2-3"), ("fd00::7", "fd00--7")):
        command = command_of(built, tmp_path, POD_IP=address, POD_NAMESPACE="ckptd")
        name = f"{label}.{service['metadata']['name']}.ckptd.svc.cluster.local"
        assert command[command.index("--advertise") + 1] == f"{name}:{service['spec']['ports'][0]['port']}"


def test_the_settings_are_settings(built: list[Object], tmp_path: Path) -> None:
    text = one(built, "ConfigMap")["data"]["ckptd.toml"]
    (folder,) = [mount["mountPath"] for mount in container_of(built)["volumeMounts"] if mount["name"] == "tls"]
    for file in ("tls.crt", "tls.key", "ca.crt"):
        (tmp_path / file).touch()
    here = tmp_path / "ckptd.toml"
    here.write_text(text.replace(folder, str(tmp_path)))
    settings = load_settings({"config": here})
    assert settings.tls_ca == tmp_path / "ca.crt"
    assert settings.listen


def test_the_memory_of_the_pod_holds_the_slots(built: list[Object]) -> None:
    resources = container_of(built)["resources"]
    limit_bytes = parse_size(resources["limits"]["memory"] + "B")
    assert limit_bytes >= parse_size(settings_of(built)["memory"]) + HEADROOM_BYTES
    assert HEADROOM_BYTES >= RESERVE_BYTES
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert "cpu" not in resources["limits"]


def test_what_the_settings_name_is_mounted(built: list[Object], tmp_path: Path) -> None:
    settings = settings_of(built)
    mounts = {mount["mountPath"]: mount["name"] for mount in container_of(built)["volumeMounts"]}
    command = command_of(built, tmp_path, POD_IP="10.1.2.3", POD_NAMESPACE="ckptd")
    assert mounts[settings["arena"]] == "arena"
    assert mounts[str(Path(settings["socket"]).parent)] == "sockets"
    assert mounts[str(Path(command[command.index("--config") + 1]).parent)] == "settings"
    assert {mounts[str(Path(settings[key]).parent)] for key in ("tls_cert", "tls_key", "tls_ca")} == {"tls"}
    tiers = [tier.split(",")[0].removeprefix("file://") for tier in settings.get("tiers", [])]
    assert [tier for tier in tiers if tier not in mounts] == []


def test_slots_and_sockets_outlive_the_pod(built: list[Object]) -> None:
    volumes = {volume["name"]: volume for volume in pod_of(built)["volumes"]}
    assert volumes["arena"]["hostPath"]["path"].startswith("/dev/shm/")
    assert volumes["sockets"]["hostPath"]["path"] == str(Path(settings_of(built)["socket"]).parent)


def test_a_drain_is_not_cut_short(built: list[Object]) -> None:
    _, before_s, *_ = container_of(built)["lifecycle"]["preStop"]["exec"]["command"]
    assert pod_of(built)["terminationGracePeriodSeconds"] > int(before_s) + settings_of(built)["drain_deadline"]


def test_a_pod_that_is_to_stop_waits_for_drains_under_way(stage: Stage) -> None:
    *_, script = container_of(read("base/daemonset.yaml"))["lifecycle"]["preStop"]["exec"]["command"]
    daemon = stage.daemon(http=True)
    subprocess.run([sys.executable, "-c", script.replace("localhost:9464", daemon.http)], timeout=20, check=True)
    waits = script.replace("drains_queued 0.0", "drains_queued 1.0").replace("localhost:9464", daemon.http)
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", waits], timeout=2, check=False)


def test_the_probes_ask_for_pages_that_there_are(stage: Stage) -> None:
    objects = read("base/daemonset.yaml")
    probes = {name: probe for name, probe in container_of(objects).items() if name.endswith("Probe")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startupProbe": "/livez",
        "livenessProbe": "/livez",
        "readinessProbe": "/readyz",
    }
    (monitor,) = read("components/monitoring/podmonitor.yaml")
    pages = {probe["httpGet"]["path"] for probe in probes.values()}
    pages |= {endpoint["path"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    daemon = stage.daemon(http=True)
    assert {page: daemon.get(page)[0] for page in pages} == dict.fromkeys(pages, 200)


def test_ports_are_those_of_the_settings(built: list[Object]) -> None:
    settings, container = settings_of(built), container_of(built)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        name: int(settings[key].rpartition(":")[2]) for name, key in (("peers", "listen"), ("http", "http"))
    }
    used = {probe["httpGet"]["port"] for name, probe in container.items() if name.endswith("Probe")}
    used |= {port["targetPort"] for port in one(built, "Service")["spec"]["ports"]}
    used |= {port["port"] for rule in one(built, "NetworkPolicy")["spec"]["ingress"] for port in rule["ports"]}
    assert used <= ports.keys()


def test_the_daemon_has_no_privilege(built: list[Object]) -> None:
    pod, container = pod_of(built), container_of(built)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    context = container["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    (first,) = pod["initContainers"]
    assert first["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN", "FOWNER"]}


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root has capabilities to drop")
def test_two_capabilities_are_enough_to_prepare_the_folders(tmp_path: Path) -> None:
    pod = pod_of(read("base/daemonset.yaml"))
    (first,) = pod["initContainers"]
    names = {"/arena": tmp_path / "arena", "/run/ckptd": tmp_path / "run"}
    script = first["args"][0]
    for name, here in names.items():
        here.mkdir(mode=0o755)
        script = script.replace(name, str(here))
    caps = "-all," + ",".join(f"+{name.lower()}" for name in first["securityContext"]["capabilities"]["add"])
    user = pod["securityContext"]["runAsUser"]
    for _ in ("first start", "every other"):
        subprocess.run(["setpriv", "--bounding-set", caps, "--no-new-privs", *first["command"], script], check=True)
        found = [(here.stat().st_uid, here.stat().st_gid, here.stat().st_mode & 0o777) for here in names.values()]
        assert found == [(user, user, 0o700), (user, user, 0o750)]


def test_only_daemons_reach_the_port_of_daemons(built: list[Object]) -> None:
    labels = one(built, "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    policy = one(built, "NetworkPolicy")["spec"]
    assert policy["podSelector"] == {"matchLabels": labels}
    froms = [rule["from"] for rule in policy["ingress"] if {"port": "peers"} in rule["ports"]]
    assert froms == [[{"podSelector": {"matchLabels": labels}}]]


# --- who watches, who trains --------------------------------------------------------------------------------------
def test_prometheus_finds_the_pods_under_the_job_of_the_rules() -> None:
    objects = build("overlays/example")
    monitor, template = one(objects, "PodMonitor"), one(objects, "DaemonSet")["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["spec"]["jobLabel"]] == "ckptd"
    assert monitor["metadata"]["namespace"] == one(objects, "DaemonSet")["metadata"]["namespace"]
    ports = {port["name"] for port in container_of(objects)["ports"]}
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_the_operator_gets_the_rules_of_deploy_prometheus() -> None:
    printed = module_at(FOLDER / "rules.py").manifest()
    assert (FOLDER / "components/monitoring/rules.yaml").read_text() == printed, "see deploy/kubernetes/rules.py"
    files = [ROOT / "deploy/prometheus" / name for name in ("recording.yml", "alerts.yml")]
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    assert yaml.safe_load(printed)["spec"]["groups"] == groups


def test_the_example_of_a_trainer_reaches_the_daemon() -> None:
    (trainer,) = read("examples/trainer.yaml")
    (kustomized,) = read("base/daemonset.yaml")
    settings = tomllib.loads((FOLDER / "base/ckptd.toml").read_text())
    pod, daemon = trainer["spec"], kustomized["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {item["name"]: item["value"] for item in container["env"]}
    assert environment["CKPTD_DAEMON"] == f"unix://{settings['socket']}"
    (volume,) = pod["volumes"]
    sockets = next(volume for volume in daemon["volumes"] if volume["name"] == "sockets")
    assert volume["hostPath"]["path"] == sockets["hostPath"]["path"]
    assert container["volumeMounts"][0]["mountPath"] == str(Path(settings["socket"]).parent)
    assert daemon["securityContext"]["runAsGroup"] in pod["securityContext"]["supplementalGroups"]


def test_one_certificate_with_a_wildcard_does_for_every_pod() -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("*.ckptd.ckptd.svc.cluster.local")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()

    def code_of(name: str) -> grpc.StatusCode:
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        options = (("grpc.ssl_target_name_override", name),)
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
            try:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    try:
        assert code_of("10-1-2-3.ckptd.ckptd.svc.cluster.local") is grpc.StatusCode.OK
        assert code_of("10.1.2.3") is not grpc.StatusCode.OK
    finally:
        server.stop(0).wait()


# --- the image ----------------------------------------------------------------------------------------------------
def test_the_image_is_made_of_what_there_is() -> None:
    text = (ROOT / "deploy/container/Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.M) for name in line.split()}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {package.split("/")[0] for package in packages} <= copied
    (extras,) = re.findall(r"\"\.\[([\w,]+)\]\"", text)
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()


def test_the_user_of_the_image_is_that_of_the_pods() -> None:
    text = (ROOT / "deploy/container/Dockerfile").read_text()
    context = pod_of(read("base/daemonset.yaml"))["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in text
