"""What the Dockerfiles and the compose file promise, as their text says: building takes minutes."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from shiwu_worker.config import Settings

ROOT: Final = Path(__file__).resolve().parents[2]
DOCKER: Final = ROOT / "docker"
DOCKERFILES: Final = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE: Final = DOCKER / "compose.yaml"
PINNED: Final = re.compile(r"[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}")
SECRET: Final = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL", re.I)
SCRIPTS: Final = Path(sysconfig.get_path("scripts"))
READ_BY_PRODUCERS: Final = {"SHIWU_REDIS_URL"}
OF_THE_ENDPOINT: Final = {"SHIWU_HTTP_HOST", "SHIWU_HTTP_PORT"}

every_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its arguments) in order, with continued lines joined and comments left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    split = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, _, rest in split]


def of_kind(path: Path, name: str) -> list[str]:
    """The arguments of every instruction of one kind."""
    return [rest for kind, rest in instructions(path) if kind == name]


def final_stage(path: Path) -> list[tuple[str, str]]:
    """What makes the image that is shipped."""
    found = instructions(path)
    last = max(number for number, (name, _) in enumerate(found) if name == "FROM")
    return found[last:]


def compose() -> dict[str, Any]:
    """The compose file as it is written, anchors resolved."""
    content: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return content


def known_settings() -> set[str]:
    return {f"SHIWU_{name.upper()}" for name in Settings.model_fields} | OF_THE_ENDPOINT


def environment(service: dict[str, Any]) -> dict[str, Any]:
    return dict(service.get("environment") or {})


def test_the_files_are_found() -> None:
    """The tests below look at something."""
    assert [path.name for path in DOCKERFILES] == ["producer.Dockerfile", "worker.Dockerfile"]


@every_dockerfile
def test_hadolint_finds_nothing(path: Path) -> None:
    """Every rule of hadolint, none ignored."""
    done = subprocess.run(
        [SCRIPTS / "hadolint", "--no-color", path], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@every_dockerfile
def test_bases_are_pinned(path: Path) -> None:
    """Every stage begins with the pinned Python or with another stage."""
    default = next(rest for rest in of_kind(path, "ARG") if rest.startswith("PYTHON_IMAGE="))
    assert PINNED.fullmatch(default.partition("=")[2])
    stages = {rest.split(" AS ")[1] for rest in of_kind(path, "FROM") if " AS " in rest}
    assert {rest.split(" AS ")[0] for rest in of_kind(path, "FROM")} <= stages | {"${PYTHON_IMAGE}"}


def test_both_images_share_one_base() -> None:
    """One base to update, one to download."""
    assert len({next(r for r in of_kind(path, "ARG") if r.startswith("PYTHON_IMAGE=")) for path in DOCKERFILES}) == 1


@every_dockerfile
def test_the_image_runs_as_a_user_without_rights(path: Path) -> None:
    """By number, or Kubernetes' runAsNonRoot can't tell; and it stays the user to the end."""
    users = [rest for name, rest in final_stage(path) if name == "USER"]
    assert users == ["10001:10001"]


@every_dockerfile
def test_the_first_process_reaps_and_passes_signals_on(path: Path) -> None:
    """An exec form with tini; a shell would swallow SIGTERM and the drain with it."""
    (entrypoint,) = [json.loads(rest) for name, rest in final_stage(path) if name == "ENTRYPOINT"]
    assert entrypoint[:2] == ["/usr/bin/tini", "--"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert entrypoint[2] in scripts


@every_dockerfile
def test_no_compiler_and_no_pip_reach_the_end(path: Path) -> None:
    """The last stage installs tini alone; libraries come from a stage before, in an environment without pip."""
    runs = " ".join(rest for name, rest in final_stage(path) if name == "RUN")
    assert re.findall(r"--no-install-recommends ([^&]+?)\s+&&", runs) == ["tini=0.19.*"]
    assert "pip" not in runs
    assert "venv --without-pip /opt/shiwu" in " ".join(of_kind(path, "RUN"))


@every_dockerfile
def test_every_installation_is_constrained(path: Path) -> None:
    """constraints.txt decides every version, but where there is nothing left to decide."""
    installs = re.findall(r"pip\S* (?:--python \S+ )?install ([^&;]+)", " ".join(of_kind(path, "RUN")))
    assert installs
    for arguments in installs:
        assert "-c constraints.txt" in arguments or "--no-deps" in arguments or '"$@"' in arguments, arguments


@every_dockerfile
def test_no_secret_is_asked_for_or_kept(path: Path) -> None:
    """Neither ARG nor ENV names one: both stay in the image's history."""
    named = [rest for kind in ("ARG", "ENV") for rest in of_kind(path, kind)]
    assert [rest for rest in named if SECRET.search(rest)] == []


@every_dockerfile
def test_what_is_copied_exists_and_is_not_ignored(path: Path) -> None:
    """Each COPY from the context, against the files and against .dockerignore."""
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"
    }
    sources = [one for rest in of_kind(path, "COPY") if "--from=" not in rest for one in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed, source


def test_the_context_holds_nothing_else() -> None:
    """Ignored first, allowed by name: what nobody thought of stays out, and nothing is allowed in vain."""
    lines = [
        one for one in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if one[:1] not in {"#", ""}
    ]
    assert lines[0] == "*"
    copied = {one for path in DOCKERFILES for rest in of_kind(path, "COPY") for one in rest.split()[:-1]}
    assert {line[1:] for line in lines if line[0] == "!"} <= copied


@every_dockerfile
def test_settings_in_the_image_exist(path: Path) -> None:
    """ENV SHIWU_X is a setting."""
    found = set(re.findall(r"\b(SHIWU_[A-Z0-9_]+)=", " ".join(of_kind(path, "ENV"))))
    assert found <= known_settings()


def test_the_worker_is_asked_whether_it_is_ready() -> None:
    """HEALTHCHECK runs code that compiles, and asks the port that the image sets."""
    path = DOCKER / "worker.Dockerfile"
    (check,) = of_kind(path, "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert "/readyz" in command[2]
    assert "SHIWU_HTTP_PORT=9808" in " ".join(of_kind(path, "ENV"))
    assert "9808" in of_kind(path, "EXPOSE")


@every_dockerfile
def test_labels_say_what_it_is(path: Path) -> None:
    """The OCI's own names."""
    labels = " ".join(of_kind(path, "LABEL"))
    for name in ("title", "description", "licenses", "version", "revision", "created", "source"):
        assert f"org.opencontainers.image.{name}=" in labels
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"VERSION={version}" in of_kind(path, "ARG")


def test_the_requirements_are_those_of_pyproject() -> None:
    """docker/requirements.py leaves none out, and everything it prints is pinned."""
    read = runpy.run_path(str(DOCKER / "requirements.py"))["requirements"]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    content = tomllib.loads(text)
    project = content["project"]
    assert read(text) == project["dependencies"]
    assert read(text, "worker") == project["dependencies"] + project["optional-dependencies"]["worker"]
    assert read(text, "--build-system") == content["build-system"]["requires"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower()
    for line in read(text, "worker") + read(text, "--build-system"):
        assert f"\n{re.split(r'[^A-Za-z0-9_.-]', line)[0].lower()}==" in f"\n{pinned}", line


def compose_command() -> list[str] | None:
    """Docker Compose itself: the plugin, or the binary of the development tools where it runs on this machine."""
    for command in (["docker", "compose"], [str(SCRIPTS / "docker-compose")]):
        if shutil.which(command[0]):
            try:
                done = subprocess.run([*command, "version"], capture_output=True, text=True, timeout=30, check=False)
            except OSError:
                continue
            if done.returncode == 0 and "Compose" in done.stdout:
                return command
    return None


@pytest.mark.parametrize("profiles", [(), ("gpu",), ("observe",), ("gpu", "observe")], ids="+".join)
def test_docker_compose_reads_it(profiles: tuple[str, ...]) -> None:
    """The specification's schema and more, by Docker Compose: it knows every key and every reference between them."""
    command = compose_command()
    if command is None:
        pytest.skip("no Docker Compose runs on this machine")
    asked = [part for profile in profiles for part in ("--profile", profile)]
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    done = subprocess.run(
        [*command, "-f", COMPOSE, *asked, "config", "--format", "json"],
        capture_output=True,
        check=False,
        text=True,
        timeout=30,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    names = set(json.loads(done.stdout)["services"])
    assert {"valkey", "s3", "pictures", "worker", "producer"} <= names
    assert ("worker-gpu" in names, {"prometheus", "grafana"} <= names) == ("gpu" in profiles, "observe" in profiles)


def test_every_image_of_others_is_pinned() -> None:
    """By tag for people and by digest for machines; our own are built."""
    for name, service in compose()["services"].items():
        if service["image"].endswith(":local"):
            continue
        assert PINNED.fullmatch(service["image"]), name


def test_settings_in_compose_exist() -> None:
    """Every SHIWU_ name is a setting of the worker."""
    for name, service in compose()["services"].items():
        asked = {key for key in environment(service) if key.startswith("SHIWU_")}
        assert asked <= known_settings(), name
    assert set(environment(compose()["services"]["producer"])) == READ_BY_PRODUCERS


def test_the_queue_keeps_what_it_is_given() -> None:
    """An AOF, and no eviction."""
    command = " ".join(compose()["services"]["valkey"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_nothing_listens_beyond_this_machine() -> None:
    """Every published port is bound to loopback: the demo has no passwords worth the name."""
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_credentials_are_the_demos_own() -> None:
    """Each can be replaced from outside, and its default says what it is."""
    for name, service in compose()["services"].items():
        for key, value in environment(service).items():
            if SECRET.search(key) and not key.startswith("GF_"):
                assert re.fullmatch(r"\$\{\w+:-shiwu-demo[\w-]*\}", value), f"{name}: {key}"


@pytest.mark.parametrize("name", ["pictures", "worker", "worker-gpu", "producer"])
def test_our_own_containers_may_nothing(name: str) -> None:
    """A root that is read-only, no capabilities, no way to new ones."""
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
def test_a_worker_is_given_the_time_to_drain(name: str) -> None:
    """stop_grace_period is longer than SHIWU_GRACE_S."""
    service = compose()["services"][name]
    grace_s = float(environment(service)["SHIWU_GRACE_S"])
    assert float(service["stop_grace_period"].removesuffix("s")) >= grace_s + 5


def test_what_is_mounted_exists() -> None:
    """Docker would make an empty folder in place of a file that is missing."""
    mounts = [one for service in compose()["services"].values() for one in service.get("volumes", [])]
    sources = [one["source"] if isinstance(one, dict) else one.partition(":")[0] for one in mounts]
    files = [source for source in sources if source.startswith(".")]
    assert len(files) >= 5
    for source in files:
        place = (DOCKER / source).resolve()
        if (ROOT / "helm") in place.parents and not (ROOT / "helm").exists():
            continue
        assert place.exists(), source


def test_every_picture_that_is_asked_about_is_put() -> None:
    """The producer's references are labels of the samples, in the bucket that the store makes."""
    services = compose()["services"]
    rows = json.loads((ROOT / "tests/support/samples/samples.json").read_text(encoding="utf-8"))
    asked = [one for one in services["producer"]["command"] if one.startswith("s3://")]
    assert len(asked) >= 10
    assert set(asked) <= {f"s3://pictures/{row['label']}.jpg" for row in rows}
    assert "-bucket=pictures" in services["s3"]["command"]
    assert "-master.telemetry=false" in services["s3"]["command"]


def test_prometheus_asks_the_workers() -> None:
    """The names of the services and the port of the image."""
    config = yaml.safe_load((DOCKER / "observe" / "prometheus.yaml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found["names"]) <= set(compose()["services"])
    assert f"SHIWU_HTTP_PORT={found['port']}" in " ".join(of_kind(DOCKER / "worker.Dockerfile", "ENV"))


def test_grafana_reads_from_prometheus() -> None:
    """The data source's address is the service, and the folder of dashboards is the one that is mounted."""
    sources = yaml.safe_load((DOCKER / "observe/grafana/datasources/prometheus.yaml").read_text(encoding="utf-8"))
    assert [one["url"] for one in sources["datasources"]] == ["http://prometheus:9090"]
    boards = yaml.safe_load((DOCKER / "observe/grafana/dashboards/shiwu.yaml").read_text(encoding="utf-8"))
    (folder,) = [one["options"]["path"] for one in boards["providers"]]
    mounted = [one for one in compose()["services"]["grafana"]["volumes"] if isinstance(one, dict)]
    assert [Path(one["target"]).parent for one in mounted] == [Path(folder)]
