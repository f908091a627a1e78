"""Hub ids as --pretrained_model_name_or_path, against a local HTTP server that answers as the hub does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TIME_LIMIT
from reward_servers import QuietHandler

SECRET = "hf_notarealtokenbutsecret"
GATED = "Access to model lab/gated is restricted. You must have access to it and be authenticated to access it."


class Hub(QuietHandler):
    """A hub where lab/gated needs a licence and lab/missing doesn't exist."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        gated = "lab/gated" in self.path
        code, message = ("GatedRepo", GATED) if gated else ("RepoNotFound", "Repository not found")
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.reply(403 if gated else 404, json.dumps({"error": message}).encode(), headers)

    do_HEAD = do_GET


class Models(QuietHandler):
    """Serves the files of `models`: repository -> folder."""

    def do_GET(self) -> None:
        user, name, kind, _, path = (self.path.removeprefix("/api/models/").strip("/") + "////").split("/", 4)
        folder, commit = self.server.models[f"{user}/{name}"], user.encode().hex().ljust(40, "0")
        if self.path.startswith("/api/models/"):
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            tree = [{"type": "file", "path": k, "size": v.stat().st_size, "oid": commit} for k, v in files.items()]
            model = {"id": f"{user}/{name}", "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            self.reply(200, json.dumps(tree if kind == "tree" else model).encode())
        elif (file := folder / path.strip("/")).is_file():
            self.reply(200, file.read_bytes(), {"ETag": f'"{hash((name, path))}"', "X-Repo-Commit": commit})
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})

    do_HEAD = do_GET


@pytest.fixture
def train_on(flags, tmp_path, subprocess_environment) -> Callable:
    """train_on(hub, machine, flag=value, ...) -> the trainer's finished process. Each machine has its own cache."""

    def run(hub, machine: str = "machine", **given) -> subprocess.CompletedProcess:
        environment = subprocess_environment | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": SECRET}
        environment |= {"HF_HOME": str(tmp_path / machine), "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        return subprocess.run(
            [sys.executable, "-m", "fastvideo.train_grpo_flux", *flags(output_dir=tmp_path / "out", **given)],
            env=environment, capture_output=True, text=True, timeout=TIME_LIMIT,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("repository", ["lab/gated", "lab/missing"])
def test_a_hub_repository_that_gives_nothing_ends_in_one_line_that_says_what_to_do(
    http_server, repository, train_on, tmp_path
):
    hub = http_server(Hub, asked=[])
    done = train_on(hub, pretrained_model_name_or_path=repository)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()
    start = next(i for i, line in enumerate(message) if line.startswith("train_grpo_flux.py: error"))
    assert f"--pretrained_model_name_or_path {repository}" in message[start]
    assert "licence" in message[start] and "HF_TOKEN" in message[start]
    assert any(repository in path for path in hub.asked)
    assert "Traceback" not in done.stderr and SECRET not in done.stdout + done.stderr
    written = [path.read_text(errors="replace") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(SECRET in text for text in written)


@pytest.mark.long
def test_a_run_goes_on_where_its_base_model_was_not_downloaded_yet(
    http_server, train_on, tiny_flux, random_flux, prompts_file
):
    hub = http_server(Models, models={"lab/tiny": Path(tiny_flux), "lab/other": Path(random_flux)})
    given = {"prompts_file": prompts_file, "use_lora": True, "lora_rank": 2}
    model = "pretrained_model_name_or_path"
    for machine, steps, resume in (("first", 1, {}), ("second", 2, {"resume_from_checkpoint": "latest"})):
        done = train_on(hub, machine, **given, **resume, **{model: "lab/tiny"}, max_train_steps=steps)
        assert done.returncode == 0, done.stderr[-4000:]
    done = train_on(hub, "third", **given, **resume, **{model: "lab/other"}, max_train_steps=3)
    assert done.returncode == 2
    assert "was trained from another base model (lab/tiny) than" in done.stderr.splitlines()[-1]
