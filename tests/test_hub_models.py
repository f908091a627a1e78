"""Hub ids as --pretrained_model_name_or_path, against a local HTTP server that answers as the hub does."""

import json
import subprocess
import sys

import pytest
from reward_servers import QuietHandler

GATED = "Access to model lab/gated is restricted. You must have access to it and be authenticated to access it."


class Hub(QuietHandler):
    """lab/gated is there but needs a licence; lab/missing isn't."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        gated = "lab/gated" in self.path
        code, message = ("GatedRepo", GATED) if gated else ("RepoNotFound", "Repository not found")
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.reply(403 if gated else 404, json.dumps({"error": message}).encode(), headers)

    do_HEAD = do_GET


@pytest.mark.parametrize("repository", ["lab/gated", "lab/missing"])
def test_a_hub_repository_that_gives_nothing_ends_in_one_line_that_says_what_to_do(
    http_server, repository, flags, tmp_path, subprocess_environment
):
    hub = http_server(Hub, asked=[])
    secret = "hf_notarealtokenbutsecret"
    environment = subprocess_environment | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": secret}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    argv = flags(pretrained_model_name_or_path=repository, output_dir=tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-m", "fastvideo.train_grpo_flux", *argv],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()
    start = next(i for i, line in enumerate(message) if line.startswith("train_grpo_flux.py: error"))
    assert f"--pretrained_model_name_or_path {repository}" in message[start]
    assert "licence" in message[start] and "HF_TOKEN" in message[start]
    assert any(repository in path for path in hub.asked)
    assert "Traceback" not in done.stderr and secret not in done.stdout + done.stderr
    written = [path.read_text(errors="replace") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(secret in text for text in written)
