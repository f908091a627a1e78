"""Dockerfile and .dockerignore, as far as they can be checked without Docker."""

import fnmatch
import re

from fastvideo.io.secrets import redact

import pytest
from conftest import ROOT

LINES = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
STEPS = [line.split(maxsplit=1) for line in LINES if line and not line.startswith("#")]
IGNORED = [
    line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")
]


def values(instruction: str) -> list[str]:
    return [rest for name, rest in STEPS if name == instruction]


def test_every_file_that_is_copied_is_in_the_repository_and_not_left_out():
    for step in values("COPY"):
        *sources, _ = [word for word in step.split() if not word.startswith("--")]
        for source in sources:
            left_out = [pattern for pattern in IGNORED if fnmatch.fnmatch(source, pattern)]
            assert (ROOT / source).exists() and not left_out, source
    assert values("COPY")[-1].split()[1:] == [".", "."]


def test_the_environment_is_the_one_that_env_setup_makes_of_the_pinned_versions():
    assert "bash env_setup.sh" in " ".join(values("RUN")) and "pip install" not in " ".join(values("RUN"))
    (argument,) = values("ARG")
    assert argument.partition("=")[0] in (ROOT / "env_setup.sh").read_text(encoding="utf-8")
    first = values("COPY")[0].split()
    assert {"requirements.txt", "pyproject.toml", "env_setup.sh"} <= set(first)
    (base,) = values("FROM")
    assert re.fullmatch(r"nvidia/cuda:13\.\d+\.\d+-devel-ubuntu24\.04", base)  # its Python 3.12 is one that is tested
    assert "(Python 3.10-3.12)" in (ROOT / "requirements.txt").read_text(encoding="utf-8")


def test_the_program_runs_without_root_and_what_it_writes_outlives_it():
    order = [name for name, _ in STEPS]
    assert values("USER") == ["trainer"] and order.index("USER") < order.index("COPY")
    assert (
        values("VOLUME") == ['["/hub", "/app/data", "/app/outputs", "/app/image_reward_ckpt", "/app/hps_ckpt"]']
        and "HF_HOME=/hub" in values("ENV")[0]
    )
    assert values("CMD") == ['["hier-grpo", "train", "--help"]']


def test_no_secret_and_nothing_that_git_ignores_goes_into_the_image():
    text = "\n".join(LINES)
    assert redact(text) == text and not re.search(r"(TOKEN|KEY|PASSWORD)\s*=", text)
    for pattern in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines():
        found = {pattern.rstrip("/"), f"**/{pattern.rstrip('/')}"}
        assert found & set(IGNORED), pattern


@pytest.mark.parametrize("program", ["g++", "ninja-build", "python3-venv", "pdsh"])
def test_what_compiling_and_several_nodes_need_is_installed(program):
    assert program in values("RUN")[0].split()
