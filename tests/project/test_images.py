"""What the Dockerfiles promise, as their text says. `docker/build-here.sh` builds them, which takes minutes."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from shiwu_worker.config.settings import Settings
from tests.support.dockerfiles import (
    DOCKER,
    PINNED,
    ROOT,
    SECRET,
    final_stage,
    health_command,
    of_kind,
    read,
    variables,
)
from tests.support.picture_server import PictureServer, Reply
from tests.support.processes import LOOPBACK, clean_environment, free_ports

DOCKERFILES: Final = sorted(DOCKER.glob("*.Dockerfile"))
WORKER: Final = DOCKER / "worker.Dockerfile"
SCRIPTS: Final = Path(sysconfig.get_path("scripts"))

every_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def base_of(path: Path) -> str:
    return next(rest for rest in of_kind(read(path), "ARG") if rest.startswith("PYTHON_IMAGE=")).partition("=")[2]


def ignore_lines() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line[:1] not in {"#", ""}]


def copied(path: Path) -> list[str]:
    """What comes from the context."""
    return [one for rest in of_kind(read(path), "COPY") if "--from=" not in rest for one in rest.split()[:-1]]


def test_the_files_are_found() -> None:
    """The tests below look at something."""
    assert [path.name for path in DOCKERFILES] == ["producer.Dockerfile", "worker.Dockerfile"]


@every_dockerfile
def test_hadolint_finds_nothing(path: Path) -> None:
    """Every rule of hadolint, none ignored."""
    assert "hadolint ignore" not in path.read_text(encoding="utf-8")
    done = subprocess.run(
        [SCRIPTS / "hadolint", "--no-color", path], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@every_dockerfile
def test_bases_are_pinned(path: Path) -> None:
    """Every stage begins with the pinned Python or with another stage, and takes files from stages alone."""
    assert PINNED.fullmatch(base_of(path))
    froms = of_kind(read(path), "FROM")
    stages = {rest.split(" AS ")[1] for rest in froms if " AS " in rest}
    assert {rest.split(" AS ")[0] for rest in froms} <= stages | {"${PYTHON_IMAGE}"}
    assert set(re.findall(r"--from=(\S+)", " ".join(of_kind(read(path), "COPY")))) <= stages
    assert of_kind(read(path), "ADD") == []


def test_both_images_share_one_base() -> None:
    """One base to update, one to download."""
    assert len({base_of(path) for path in DOCKERFILES}) == 1


def test_the_base_is_a_python_that_is_supported() -> None:
    """The base's version is one that pyproject.toml allows."""
    found = re.match(r"python:(\d+)\.(\d+)\.", base_of(WORKER))
    assert found
    least = re.fullmatch(r">=(\d+)\.(\d+)", pyproject()["project"]["requires-python"])
    assert least
    assert tuple(map(int, found.groups())) >= tuple(map(int, least.groups()))


@every_dockerfile
def test_the_image_runs_as_a_user_without_rights(path: Path) -> None:
    """By number, or Kubernetes' runAsNonRoot can't tell; nothing that is copied belongs to it."""
    last = final_stage(read(path))
    assert of_kind(last, "USER") == ["10001:10001"]
    runs = " ".join(of_kind(last, "RUN"))
    assert "groupadd --gid 10001 " in runs
    assert "useradd --uid 10001 --gid 10001 " in runs
    assert [rest for rest in of_kind(last, "COPY") if "--chown" in rest] == []


@every_dockerfile
def test_the_root_may_be_read_only(path: Path) -> None:
    """What programs write by habit goes to /tmp, which is the only place they need; no volume hides in the image."""
    last = final_stage(read(path))
    assert variables(last)["HOME"] == "/tmp"  # noqa: S108 the container's own
    assert variables(last)["PYTHONDONTWRITEBYTECODE"] == "1"
    assert of_kind(last, "WORKDIR") == ["/tmp"]  # noqa: S108 as above
    assert of_kind(last, "VOLUME") == []


@every_dockerfile
def test_the_first_process_reaps_and_passes_signals_on(path: Path) -> None:
    """An exec form with tini; a shell would swallow SIGTERM and the drain with it."""
    (entrypoint,) = [json.loads(rest) for rest in of_kind(final_stage(read(path)), "ENTRYPOINT")]
    assert entrypoint[:2] == ["/usr/bin/tini", "--"]
    assert entrypoint[2] in pyproject()["project"]["scripts"]


@every_dockerfile
def test_no_compiler_and_no_pip_reach_the_end(path: Path) -> None:
    """The last stage installs tini alone; libraries come from a stage before, in an environment without pip.

    A compiler is installed only where it was asked for.
    """
    asked = {one for one in of_kind(final_stage(read(path)), "RUN") if "COMPILER" in one}
    assert asked == set() or "COMPILER=none" in of_kind(final_stage(read(path)), "ARG")
    runs = " ".join(one for one in of_kind(final_stage(read(path)), "RUN") if one not in asked)
    assert re.findall(r"--no-install-recommends ([^&]+?)\s+&&", runs) == ["tini=0.19.*"]
    assert "pip" not in runs
    assert "/usr/local/lib/python3*/site-packages/*" in runs  # the base's own pip
    assert "venv --without-pip /opt/shiwu" in " ".join(of_kind(read(path), "RUN"))


@pytest.mark.parametrize(("asked", "code", "said"), [("none", 0, ""), ("g++", 0, "install"), ("gcc", 2, "expected")])
def test_compiler_is_installed_where_it_is_asked_for(tmp_path: Path, asked: str, code: int, said: str) -> None:
    """The RUN itself, with an apt-get that prints what it is asked for; a misspelt compiler ends the build."""
    [run] = [one for one in of_kind(final_stage(read(WORKER)), "RUN") if "COMPILER" in one]
    for name in ("apt-get", "rm"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$0 $@"\n', encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.defpath}", "COMPILER": asked}
    done = subprocess.run(["sh", "-c", run], env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert ("g++=" in done.stdout) == (asked == "g++")


def test_compiled_models_are_kept_in_one_folder() -> None:
    """Of torch and of Triton; the chart mounts a claim there."""
    folders = [variables(read(WORKER))[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
    assert folders == ["/tmp/compiled/inductor", "/tmp/compiled/triton"]  # noqa: S108 the container's own


@every_dockerfile
def test_every_installation_is_constrained(path: Path) -> None:
    """constraints.txt decides every version, but where there is nothing left to decide."""
    installs = re.findall(r"pip\S* (?:--python \S+ )?install ([^&;]+)", " ".join(of_kind(read(path), "RUN")))
    assert installs
    for arguments in installs:
        assert "-c constraints.txt" in arguments or "--no-deps" in arguments or '"$@"' in arguments, arguments


def test_either_kind_of_torch_is_the_pinned_one() -> None:
    """`"$@"` above is constraints.txt, or torch.txt alone, which is cut out of it."""
    runs = " ".join(of_kind(read(WORKER), "RUN"))
    assert "cuda) set -- -c constraints.txt ;;" in runs
    assert 'cpu) set -- --no-deps --index-url "${TORCH_CPU_INDEX_URL}" ;;' in runs
    assert "grep --max-count=1 '^torch==' constraints.txt > torch.txt" in runs
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert len([line for line in pins if line.startswith("torch==")]) == 1


@every_dockerfile
def test_no_secret_is_asked_for_or_kept(path: Path) -> None:
    """Neither ARG nor ENV names one: both stay in the image's history."""
    named = [rest for kind in ("ARG", "ENV") for rest in of_kind(read(path), kind)]
    assert [rest for rest in named if SECRET.search(rest)] == []


@every_dockerfile
def test_what_is_copied_exists_and_is_not_ignored(path: Path) -> None:
    """Each COPY from the context, against the files and against .dockerignore."""
    allowed = {line[1:] for line in ignore_lines() if line[0] == "!"}
    assert copied(path)
    for source in copied(path):
        assert (ROOT / source).exists(), source
        assert source in allowed, source


def test_the_context_holds_nothing_else() -> None:
    """Ignored first, allowed by name: a new kind of file stays out, and each allowed one exists."""
    lines = ignore_lines()
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line[0] == "!"} == {one for path in DOCKERFILES for one in copied(path)}


def test_settings_in_the_workers_image_exist() -> None:
    """ENV SHIWU_X is a setting."""
    found = {name for name in variables(read(WORKER)) if name.startswith("SHIWU_")}
    assert found == {"SHIWU_HTTP_PORT", "SHIWU_LABELS_DIR"}
    assert found <= {f"SHIWU_{name.upper()}" for name in Settings.model_fields}


def test_the_producers_image_sets_nothing() -> None:
    """What the client reads is the user's to say."""
    assert [name for name in variables(read(DOCKER / "producer.Dockerfile")) if name.startswith("SHIWU_")] == []


def test_the_port_is_the_one_that_is_exposed() -> None:
    """EXPOSE tells people what SHIWU_HTTP_PORT tells the worker."""
    assert of_kind(final_stage(read(WORKER)), "EXPOSE") == [variables(read(WORKER))["SHIWU_HTTP_PORT"]] == ["9808"]


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1), (404, 1), (None, 1)])
def test_the_health_check_believes_readyz(status: int | None, exit_code: int) -> None:
    """HEALTHCHECK's own code, asked of a server that is ready, one that is not, and of none; past any proxy."""
    program, *arguments = health_command(read(WORKER))
    assert program == "python"
    with PictureServer() as server:
        if status is not None:
            server.serve("/readyz", Reply(status=status, body=b"why\n"))
        port = server.port if status is not None else free_ports(1)[0]
        closed = f"http://{LOOPBACK}:{free_ports(1)[0]}"
        env = clean_environment({"SHIWU_HTTP_PORT": str(port), "http_proxy": closed, "HTTP_PROXY": closed})
        done = subprocess.run(
            [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == exit_code, done.stderr
    assert ("why" in done.stdout) == (status is not None)


@every_dockerfile
def test_labels_say_what_it_is(path: Path) -> None:
    """The OCI's own names, and the version of pyproject.toml."""
    labels = " ".join(of_kind(final_stage(read(path)), "LABEL"))
    for name in ("title", "description", "licenses", "version", "revision", "created", "source"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert f"VERSION={pyproject()['project']['version']}" in of_kind(final_stage(read(path)), "ARG")
    assert f'licenses="{pyproject()["project"]["license"]}"' in labels


def test_the_requirements_are_those_of_pyproject() -> None:
    """docker/requirements.py leaves none out, and everything it prints is pinned."""
    requirements = runpy.run_path(str(DOCKER / "requirements.py"))["requirements"]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = pyproject()["project"]
    assert requirements(text) == project["dependencies"]
    assert requirements(text, "worker") == project["dependencies"] + project["optional-dependencies"]["worker"]
    assert requirements(text, "--build-system") == pyproject()["build-system"]["requires"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    for line in requirements(text, "worker") + requirements(text, "--build-system"):
        assert f"\n{re.split(r'[^A-Za-z0-9_.-]', line)[0].lower()}==" in f"\n{pinned}", line


def test_the_scripts_that_build_them_here_are_scripts() -> None:
    """bash reads them, they may be run, and every Dockerfile is built."""
    scripts = sorted(DOCKER.glob("*.sh"))
    assert [script.name for script in scripts] == ["build-here.sh", "compose-here.sh"]
    for script in scripts:
        assert os.access(script, os.X_OK)
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    built = re.findall(r"docker/\w+\.Dockerfile", scripts[0].read_text(encoding="utf-8"))
    assert {f"docker/{path.name}" for path in DOCKERFILES} == set(built)


def test_driver_is_found_where_gke_mounts_it() -> None:
    """Its device plugin sets no variable and updates no cache of the linker; images of nvidia/cuda have the same."""
    own = variables(read(DOCKER / "worker.Dockerfile"))
    assert own["LD_LIBRARY_PATH"].split(":") == ["/usr/local/nvidia/lib", "/usr/local/nvidia/lib64"]
    assert own["PATH"].split(":")[-1] == "/usr/local/nvidia/bin"
    assert "NVIDIA_VISIBLE_DEVICES" not in own
