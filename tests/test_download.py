"""scripts/huggingface/download_checkpoints.sh against a local server that plays the hub and the other hosts."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from fastvideo.eval.prompt_sets import SETS
from fastvideo.models.reward_model.spec import RewardConfig

import pytest
from conftest import TIME_LIMIT
from reward_servers import QuietHandler

ROOT = Path(__file__).parents[1]
SCRIPT = "scripts/huggingface/download_checkpoints.sh"
COMMIT = "0" * 40
HPS = b"weights of HPS" * 1000
AESTHETIC = "sac%2Blogos%2Bava1-l14-linearMSE.pth"


class Server(ThreadingHTTPServer):
    """Serves files: {URL path: content} for files that are not on the hub; repositories: {id: {file: content}}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.repositories, self.requests, self.lie = {}, {}, [], False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(QuietHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("http://hub.test/"):  # a request to a proxy
            path = path.removeprefix("http://hub.test")
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        for name, files in self.server.repositories.items():
            api = name if name.startswith("datasets/") else f"models/{name}"
            if path.startswith((f"/api/{api}", f"/{name}/resolve/")):
                return self.hub(name, files, unquote(path))
        if path not in self.server.files:
            return self.answer(404, b"no such file")
        return self.content(self.server.files[path])

    do_POST = do_GET

    def hub(self, name, files, path):
        sums = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
        if path.startswith("/api/"):
            if "/tree/" in path or "/paths-info/" in path:
                entries = [
                    {"type": "file", "path": file, "size": len(data), "oid": "1" * 40}
                    | {"lfs": {"oid": "f" * 64 if self.server.lie else sums[file], "size": len(data), "pointerSize": 1}}
                    for file, data in files.items()
                ]
                return self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            body = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        file = path.split("/resolve/")[1].split("/", 1)[1]
        return self.content(files[file], {"ETag": f'"{sums[file]}"', "X-Repo-Commit": COMMIT})

    def content(self, data, headers=None):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(200, data, headers)
        start = int(asked[1])
        if start >= len(data):
            return self.answer(416, b"")
        end = min(int(asked[2] or len(data)), len(data) - 1) if asked[2] else len(data) - 1
        ranged = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        return self.answer(206, data[start : end + 1], {**(headers or {}), **ranged})

    def answer(self, status, body, headers=None):
        self.reply(status, body, {"Accept-Ranges": "bytes", **(headers or {})})


@pytest.fixture
def server():
    with Server() as running:
        running.repositories = {
            "xswu/HPSv2": {"HPS_v2.1_compressed.pt": HPS, "HPS_v2_compressed.pt": b"older"},
            "THUDM/ImageReward": {"ImageReward.pt": b"image reward", "med_config.json": b"{}"},
            "bert-base-uncased": {"vocab.txt": b"[PAD]\n", "tokenizer_config.json": b"{}", "config.json": b"{}"},
        }
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def download(server, tmp_path):
    """download(argument, ...) -> (exit status, output) of the script, run in a copy of the scripts folder."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")

    def run(*arguments, **environment):
        cleared = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
        settings = {
            "HF_ENDPOINT": server.url,
            "WEB_MIRROR": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHON_BIN": sys.executable,
        }
        done = subprocess.run(
            ["bash", str(tmp_path / SCRIPT), *arguments],
            env={**cleared, **settings, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIME_LIMIT,
        )
        return done.returncode, done.stdout

    return run


def test_without_a_part_the_parts_and_their_sizes_are_listed_and_nothing_is_downloaded(download, server):
    status, output = download()
    sizes = dict(re.findall(r"^  (\w+) +([\d.]+) GB$", output, re.M))
    assert status == 2 and not server.requests and "or all" in output
    assert float(sizes["flux"]) > 30 and sizes["hps"] == "2.0" and sizes.keys() >= {"prompts", "mixgrpo"}
    assert float(sizes["all"]) == pytest.approx(sum(float(v) for k, v in sizes.items() if k != "all"), abs=0.5)


def test_a_dry_run_lists_every_file_with_its_size_and_downloads_nothing(download, server, tmp_path):
    drawbench = "datasets/sayakpaul/drawbench/resolve/ad794cba698c253ffdb6d18eff3fc87b004c1135/DrawBench%20Prompts"
    server.files = {f"/{drawbench}%20-%20Sheet1.csv": b"x" * 12345}
    status, output = download("all", "--dry_run")
    assert status == 0 and {method for method, *_ in server.requests} == {"HEAD"}
    assert re.search(
        r"^ +13KB  datasets/sayakpaul/drawbench DrawBench Prompts - Sheet1.csv +-> data/bench", output, re.M
    )
    assert re.search(r"^ +\?  \S+/djghosh13/geneval prompts/evaluation_metadata.jsonl +-> data/benchm", output, re.M)
    targets = [line.split(" -> ")[1] for line in output.splitlines()]
    assert len(targets) == len(output.splitlines()) > 20
    for target in (
        "hps_ckpt/HPS_v2.1_compressed.pt", "image_reward_ckpt/model_large.pth", "image_reward_ckpt/ViT-L-14.pt",
        f"image_reward_ckpt/{AESTHETIC}", "image_reward_ckpt/ImageReward.pt", "image_reward_ckpt/med_config.json",
        "data/flux/transformer/*", "data/flux2_klein/transformer/*",
        "mix_grpo_ckpt/diffusion_pytorch_model.safetensors", "the hub's cache",
    ):  # fmt: skip
        assert target in targets
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scripts"]
    assert download("hps", "--dry_run")[1].count("\n") == 1
    sizes = [
        line.split()[0] for line in download("prompts", "--dry_run", WEB_MIRROR="http://127.0.0.1:9")[1].splitlines()
    ]
    assert sizes.count("?") == 4 and all(re.fullmatch(r"\?|[\d.]+KB", size) for size in sizes)


@pytest.fixture
def prompts(download, tmp_path):
    """Made repositories of the prompts from GitHub, whose commits the script's copy pins: {target: (folder, path)}.

    A file holds the name of its target.
    """
    mirror, script, targets = tmp_path / "mirror", tmp_path / SCRIPT, {}
    for line in download("prompts", "--dry_run", WEB_MIRROR=f"file://{mirror}")[1].splitlines():
        if found := re.search(rf"file://({mirror}/[^/]+/\S+) (\S+) +-> (\S+)", line):
            targets[found[3]] = Path(found[1]), found[2]
    text = script.read_text()
    for repository in dict(targets.values()):
        for target, (folder, path) in targets.items():
            if folder == repository:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(target)
        commit = commit_all(repository)
        name = repository.relative_to(mirror)
        text, count = re.subn(rf"(pinned {name}) \w{{40}}", rf"\1 {commit}", text)
        assert count == 1
    script.write_text(text)
    return targets


def git(repository: Path, *arguments: str, **given) -> str:
    command = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, **given).stdout.strip()


def commit_all(repository: Path) -> str:
    git(repository, "init", "--quiet")
    git(repository, "config", "uploadpack.allowFilter", "true")
    git(repository, "config", "uploadpack.allowAnySHA1InWant", "true")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "prompts")
    return git(repository, "rev-parse", "HEAD")


def downloaded(tmp_path) -> dict[str, str]:
    paths = [path for path in (tmp_path / "data").rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(tmp_path).as_posix(): path.read_text() for path in paths}


def without_hub(tmp_path, owner: str = "") -> None:
    """Leaves out the data sets from the hub, or those of an owner: its client takes seconds."""
    script = tmp_path / SCRIPT
    script.write_text(re.sub(rf"\n  hub datasets/{owner}[^\n]*\\\n[^\n]*", "", script.read_text()))


@pytest.mark.slow
def test_prompts_come_at_pinned_commits_beside_the_repository_s_own(download, server, prompts, tmp_path):
    """What docs/reproduce.md promises: nothing in data/ is replaced. Every file that a benchmark reads is fetched."""
    of_hub = {f"data/benchmarks/{name}/{file}" for name in ("hpsv2", "drawbench") for file in SETS[name].files}
    for name, repository in (("hpsv2", "zhwang/HPDv2"), ("drawbench", "sayakpaul/drawbench")):
        files = {file: f"data/benchmarks/{name}/{file}".encode() for file in SETS[name].files}
        server.repositories[f"datasets/{repository}"] = files | {"train.tar": b"much"}
    status, output = download("prompts", WEB_MIRROR=f"file://{tmp_path}/mirror")
    assert status == 0, output
    wanted = {f"data/benchmarks/{name}/{file}" for name, benchmark in SETS.items() for file in benchmark.files}
    own = {"data/prompts_hpdv2.txt", "data/prompts_hpdv2_test.txt"}
    assert downloaded(tmp_path) == {target: target for target in wanted | own} and own | wanted == of_hub | set(prompts)
    pins = dict(re.findall(r"hub (datasets/\S+)@(\w{40}) ", (ROOT / SCRIPT).read_text()))
    for repository, commit in pins.items():
        asked = [path for _, path, _ in server.requests if repository in path]
        assert asked and all(f"/{commit}" in path or f"/{COMMIT}/" in path for path in asked), asked
    page = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    assert "download_checkpoints.sh prompts`" in page and all(f"`{name}`" in page for name in own)
    ignored = subprocess.run(["git", "check-ignore", *wanted], cwd=ROOT, capture_output=True, text=True).stdout.split(
        "\n"
    )
    assert {name.strip('"') for name in ignored if name} == wanted


def test_a_prompt_file_that_was_changed_is_fetched_again_and_a_right_one_asks_no_server(download, prompts, tmp_path):
    without_hub(tmp_path)
    mirror = {"WEB_MIRROR": f"file://{tmp_path}/mirror"}
    assert download("prompts", **mirror)[0] == 0
    assert downloaded(tmp_path) == {target: target for target in prompts}
    status, output = download("prompts", WEB_MIRROR="http://127.0.0.1:9")
    assert status == 0 and output.splitlines() == [f"{target} is there" for target in prompts]
    changed = "data/benchmarks/dpg/dpg_bench.csv"
    (tmp_path / changed).write_text("other prompts")
    status, output = download("prompts", **mirror)
    assert status == 0 and output.count("is there") == len(prompts) - 1 and f"dpg_bench.csv -> {changed}" in output
    assert downloaded(tmp_path) == {target: target for target in prompts}


def test_other_content_than_that_of_the_pinned_commit_is_refused(download, prompts, tmp_path):
    """A repository without the commit, and one whose file holds something else under the commit's hashes."""
    without_hub(tmp_path)
    geneval, dpg = "data/benchmarks/geneval/evaluation_metadata.jsonl", "data/benchmarks/dpg/dpg_bench.csv"
    folder, path = prompts[geneval]
    shutil.rmtree(folder / ".git")
    (folder / path).write_text("other prompts")
    commit_all(folder)
    folder, path = prompts[dpg]
    true, false = git(folder, "rev-parse", f"HEAD:{path}"), git(folder, "hash-object", "-w", "--stdin", input="false")
    true, false = (folder / ".git/objects" / name[:2] / name[2:] for name in (true, false))
    false.replace(true)
    status, output = download("prompts", WEB_MIRROR=f"file://{tmp_path}/mirror")
    last = output.splitlines()[-1]
    assert status == 1 and last.startswith(
        f"download_checkpoints.sh: this machine didn't give, or not as published: {geneval}, {dpg}; run the"
    )
    assert downloaded(tmp_path) == {target: target for target in prompts if target not in (geneval, dpg)}


@pytest.mark.slow
def test_a_host_that_can_t_be_reached_is_asked_once_and_costs_only_its_own_files(download, server, prompts, tmp_path):
    without_hub(tmp_path, "zhwang")
    files = {file: b"x" for file in SETS["drawbench"].files}
    server.repositories["datasets/sayakpaul/drawbench"] = files
    status, output = download("prompts", WEB_MIRROR="http://127.0.0.1:9")
    assert status == 1 and output.count("fatal: unable to access") == 1, output
    assert output.splitlines()[-1].startswith(
        f"download_checkpoints.sh: 127.0.0.1:9 didn't give, or not as published: {', '.join(prompts)}; run the command "
        "again, with HTTPS_PROXY or WEB_MIRROR if it can't be reached"
    )
    assert downloaded(tmp_path) == {f"data/benchmarks/drawbench/{file}": "x" for file in files}


@pytest.mark.slow
def test_a_hub_that_can_t_be_reached_is_asked_for_one_repository(download):
    status, output = download("pick", HF_ENDPOINT="http://127.0.0.1:9")
    assert status == 1 and output.count(" -> cache") == 1 and output.startswith("yuvalkirstain/PickScore_v1"), output
    assert output.splitlines()[-1].startswith(
        "download_checkpoints.sh: 127.0.0.1:9 didn't give, or not as published: yuvalkirstain/PickScore_v1, "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K; run the command again, with HTTPS_PROXY or HF_ENDPOINT if it can't be"
    )


def test_an_unknown_part_is_refused_naming_the_choices(download):
    status, output = download("hsp")
    assert (
        status == 2
        and "'hsp'; choose from flux klein hps hpsv3 image_reward clip pick geneval mixgrpo prompts, all" in output
    )


@pytest.mark.slow
def test_hub_files_come_whole_and_are_compared_with_the_hub_s_sums(download, server, tmp_path):
    status, output = download("hps")
    assert status == 0, output
    assert (tmp_path / "hps_ckpt/HPS_v2.1_compressed.pt").read_bytes() == HPS
    assert not (tmp_path / "hps_ckpt/HPS_v2_compressed.pt").exists()
    server.lie = True
    status, output = download("hps")
    assert status == 1 and "HPS_v2.1_compressed.pt: expected" in output
    assert "didn't give, or not as published: hps_ckpt/HPS_v2.1_compressed.pt; run" in output


def test_a_published_text_is_read_from_its_wheel_and_checked_and_no_code_of_the_wheel_runs(download, tmp_path):
    """HPSv3's guide: two constants of a module."""
    first, last, script = "Rate {text_prompt}: ä\n", "<|Reward|>", tmp_path / SCRIPT
    changed = re.sub(r"\n  hub (MizzenAI|Qwen)[^\n]*", "", script.read_text())
    sum_ = re.search(r"packaged hpsv3==1.0.0 \S+ 3KB (\w{64})", changed)[1]
    script.write_text(changed)
    module = f"import no_such_package\nINSTRUCTION = {first!r}\nX = f()\nprompt_with_special_token = {last!r}\n"
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels/hpsv3-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("hpsv3/dataset/data_collator_qwen.py", module)
        wheel.writestr("hpsv3-1.0.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: hpsv3\nVersion: 1.0.0\n")
        wheel.writestr("hpsv3-1.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("hpsv3-1.0.0.dist-info/RECORD", "")
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_CONFIG_FILE": os.devnull}
    status, output = download("hpsv3", **index)
    guide = tmp_path / RewardConfig.hpsv3_guide_path
    assert status == 1 and f"expected {sum_}" in output and not list(guide.parent.iterdir()), output
    script.write_text(changed.replace(sum_, hashlib.sha256((first + last).encode()).hexdigest()))
    status, output = download("hpsv3", **index)
    assert status == 0 and guide.read_text(encoding="utf-8") == first + last, output
    assert "is there" in download("hpsv3", PIP_NO_INDEX="1")[1]


def put_web_files(server, text):
    """Serves image_reward's files of other hosts. Returns the contents, and the script `text` with their checksums."""
    contents = {}
    for url, target, sum_ in re.findall(r"web (https://\S+) \\\n\s+(\S+) \S+ ?([0-9a-f]{64})?", text):
        contents[target] = b"contents of " + target.encode() * 500
        server.files["/" + url.split("/", 3)[3]] = contents[target]
        if sum_:
            text = text.replace(f" {sum_}\n", f" {hashlib.sha256(contents[target]).hexdigest()}\n")
    return contents, text


@pytest.mark.slow
def test_other_files_are_resumed_checked_and_kept(download, server, tmp_path):
    del server.repositories["xswu/HPSv2"]
    script = tmp_path / SCRIPT
    contents, changed = put_web_files(server, script.read_text())
    assert len(contents) == 3
    true_sums, clip = script.read_text(), "image_reward_ckpt/ViT-L-14.pt"

    status, output = download("image_reward")  # the checksum of the real file, which differs from these contents
    assert status == 1 and "SHA-256 is" in output and "ViT-L-14.pt" in output and "run the command again" in output
    assert not (tmp_path / clip).exists() and not (tmp_path / f"{clip}.part").exists()

    script.write_text(changed)
    (tmp_path / f"{clip}.part").write_bytes(contents[clip][:1000])
    server.requests.clear()
    status, output = download("image_reward")
    assert status == 0, output
    for target, data in contents.items():
        assert (tmp_path / target).read_bytes() == data
    asked = {path.rsplit("/", 1)[1]: part for _, path, part in server.requests if "/resolve/" not in path}
    assert asked["ViT-L-14.pt"] == "bytes=1000-"
    assert "model_large.pth" not in asked  # came in the first run
    assert (tmp_path / "image_reward_ckpt/bert-base-uncased/vocab.txt").read_text() == "[PAD]\n"

    # The download was finished, but not renamed.
    (tmp_path / clip).rename(tmp_path / f"{clip}.part")
    assert download("image_reward")[0] == 0 and (tmp_path / clip).read_bytes() == contents[clip]
    assert true_sums != changed


@pytest.mark.slow
def test_downloads_go_through_a_proxy(download, server, tmp_path):
    status, output = download("hps", HF_ENDPOINT="http://hub.test", HTTP_PROXY=server.url, http_proxy=server.url)
    assert status == 0, output
    assert (tmp_path / "hps_ckpt/HPS_v2.1_compressed.pt").read_bytes() == HPS
    assert any(path.startswith("http://hub.test/xswu/HPSv2") for _, path, _ in server.requests)
