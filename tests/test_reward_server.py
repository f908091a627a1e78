"""Remote rewards with real HTTP servers on the loopback: scores are equal, and a failed request never gives a score."""

import base64
import io
import json
import math
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from types import SimpleNamespace

from fastvideo import train_grpo_flux
from fastvideo.eval import eval_reward
from fastvideo.models.reward_model import remote
from fastvideo.models.reward_model.jpeg import JpegCompressibilityRewardModel
from fastvideo.models.reward_model.remote import check_limits, to_base64_png
from fastvideo.models.reward_model.server import ServerConfig, build_app
from fastvideo.models.reward_model.server import main as server_main
from fastvideo.models.reward_model.shapes import all_scenes, draw
from fastvideo.models.reward_model.spec import RewardSpecConfig, reward_settings
from fastvideo.models.reward_model.utils import build_reward_models, compute_reward, judge_of, served_judge

import httpx
import numpy as np
import pytest
import uvicorn
from conftest import ROOT, TIME_LIMIT, base_weights, same_weights
from PIL import Image
from reward_checkpoints import HPS_FILE, PICK_SCORE_FOLDER, PROMPTS, pictures
from reward_servers import QuietHandler
from test_group_rewards import brighter

SPEC = "shapes:3,custom_rewards:brightness"
SCENES = all_scenes(withheld=False)[::97][:6]
CAPTIONS = [scene.caption() for scene in SCENES]
PICTURES = [draw(scene) for scene in SCENES]


@pytest.fixture(autouse=True)
def no_proxy_and_short_waits(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "BACKOFF", 0.001)


@pytest.fixture
def serve():
    """serve(reward_model, models=None, **flags) runs the web application in a thread and returns its URL."""
    running = []

    def start(reward_model=SPEC, models=None, **given):
        config = ServerConfig(reward_model=reward_model, port=0, **given)
        models = models or build_reward_models(config, "cpu", config.evaluation)[0]
        web = uvicorn.Config(build_app(config, models), port=0, log_level="error")
        listener = web.bind_socket()
        server = uvicorn.Server(web)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """URL of a server that is started like users do, with the rewards SPEC of a training run."""
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "fastvideo/models/reward_model/server.py", "--reward_model", SPEC, "--port", "0"]
    path = f"{ROOT}:{ROOT / 'tests'}"
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    with open(folder / "stderr", "w") as errors:
        server = subprocess.Popen(
            [*command, "--device", "cpu", "--granular_schedule", "cosine"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    lines = [server.stdout.readline(), server.stdout.readline()]
    assert lines[0] == "rewards: ShapesRewardModel 0.75, brightness 0.25\n", (folder / "stderr").read_text()
    yield lines[1].removeprefix("listening on ").strip()
    server.terminate()
    server.wait()


class Handler(QuietHandler):
    def do_GET(self):
        self.reply(self.server.health_status, json.dumps(self.server.health).encode())

    def do_POST(self):
        body = self.read_json()
        with self.server.lock:
            self.server.requests.append(body)
            status, reply = self.server.answer(body, len(self.server.requests))
        self.reply(status, reply)


@pytest.fixture
def troubled(http_server):
    """troubled(answer) starts a server that claims to serve brightness and replies answer(body, request number)."""
    health = {
        "settings": reward_settings(RewardSpecConfig(reward_model="custom_rewards:brightness"), False),
        "models": {"custom_rewards:brightness": "brightness"},
        "limits": {"body_bytes": 2**27, "images": 64, "pixels": 2**26},
    }
    return lambda answer: http_server(Handler, answer=answer, health=dict(health), requests=[], health_status=200)


def good(body, number=0):
    scores = {"brightness": [0.25 + 0.5 * (i % 2) for i in range(len(body["images"]))]}
    return 200, json.dumps({"scores": scores}).encode()


def connect(*urls, reward_model="custom_rewards:brightness", evaluation=False, **given):
    config = RewardSpecConfig(reward_model=reward_model, reward_server=",".join(urls), **given)
    return build_reward_models(config, "cpu", evaluation)


def refusal(capsys, run, *arguments, **given):
    """The error line of a run that doesn't start."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments, **given)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# --- the same scores --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("progress,mix", [("train_step", "raw"), ("batch_index", "advantage")])
def test_training_with_a_server_writes_the_same_metrics(train, process, progress, mix):
    flags = dict(reward_model=SPEC, granular_schedule="cosine", granular_progress=progress, granular_mix=mix)
    here = train(**flags)
    there = train(**flags, reward_server=process, reward_batch_size=3)  # two requests per model and iteration
    assert there.numbers() == here.numbers()
    for line in there.metrics:
        assert line["failed_rewards"] == line["failed_brightness"] == line["failed_ShapesRewardModel"] == 0
        assert {"reward_ShapesRewardModel_form", "granular_weight_form", "reward_brightness"} <= line.keys()
        assert 0 <= line["reward_ShapesRewardModel_right"] <= 1 and "granular_weight_right" not in line
    assert same_weights(there.weights(), here.weights())


def test_evaluation_with_a_server_writes_the_same_scores(serve, tmp_path):
    for i, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{i}.png")
    entries = [{"image": f"{i}.png", "prompt": prompt} for i, prompt in enumerate(CAPTIONS)]
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    command = ["--manifest", str(tmp_path / "manifest.json"), "--reward_model_type", SPEC, "--reward_batch_size", "4"]
    assert eval_reward.main([*command, "--output_json", str(tmp_path / "here.json")]) == 0
    url = serve(evaluation=True)
    assert eval_reward.main([*command, "--output_json", str(tmp_path / "there.json"), "--reward_server", url]) == 0
    for name in ("{}.json", "{}_mean.txt", "{}_summary.json"):
        assert (tmp_path / name.format("there")).read_bytes() == (tmp_path / name.format("here")).read_bytes()


@pytest.mark.parametrize("step", [None, 3, np.array([0, 1, 2, 3, 4, 2.5])])
def test_progress_checks_and_failed_components_travel(serve, step):
    url = serve("shapes")
    wrong = [scene.mistakes()["colors exchanged"].caption() for scene in SCENES[:2]]
    prompts = [*wrong, *CAPTIONS[2:5], "not a scene"]  # the shapes reward fails on the last prompt
    total = None if step is None else 5
    local = build_reward_models(RewardSpecConfig(reward_model="shapes"), "cpu")
    far = connect(url, reward_model="shapes", reward_batch_size=4)
    here, there = (compute_reward(PICTURES, prompts, *models, step, total) for models in (local, far))
    assert list(there[2]) == list(here[2]) and len(here[2]) == 5
    for key, values in here[2].items():
        np.testing.assert_array_equal(there[2][key], values)
    np.testing.assert_array_equal(there[2]["ShapesRewardModel_right"], [0, 0, 1, 1, 1, np.nan])
    assert there[1].tolist() == [True] * 5 + [False]
    mine, theirs = (models["ShapesRewardModel"] for models, _ in (local, far))
    assert (theirs.component_names, theirs.check_names) == (mine.component_names, mine.check_names)
    assert theirs(PICTURES, CAPTIONS[0]) == mine(PICTURES, [CAPTIONS[0]] * len(PICTURES))


def test_a_server_that_answers_without_the_check_gives_no_scores(http_server):
    """For example, a server with the same settings and another version of the reward."""
    settings = reward_settings(RewardSpecConfig(reward_model="shapes"), False)
    health = {"settings": settings, "models": {"shapes": "ShapesRewardModel"}}
    health["limits"] = {"body_bytes": 2**27, "images": 64, "pixels": 2**26}
    names = ["ShapesRewardModel", *(f"ShapesRewardModel_{part}" for part in ("binding", "form", "clean"))]
    answers = {names[0]: [0.5], **{name: [0.5] for name in names[1:]}}
    reply = (200, json.dumps({"scores": answers}).encode())
    server = http_server(Handler, answer=lambda body, n: reply, health=health, requests=[], health_status=200)
    models, _ = connect(server.url, reward_model="shapes", reward_server_retries=0)
    assert np.isnan(models["ShapesRewardModel"](PICTURES[:1], CAPTIONS[:1])).all()
    answers["ShapesRewardModel_right"] = [1.0]
    reply = (200, json.dumps({"scores": answers}).encode())
    total, found = models["ShapesRewardModel"].score(PICTURES[:1], CAPTIONS[:1])
    assert total == [0.5] and found["right"] == [1.0]


def test_a_server_of_other_checks_is_refused(http_server):
    health = {
        "settings": reward_settings(RewardSpecConfig(reward_model="shapes"), False) | {"shapes.checks": []},
        "models": {"shapes": "ShapesRewardModel"},
        "limits": {"body_bytes": 2**27, "images": 64, "pixels": 2**26},
    }
    server = http_server(Handler, answer=good, health=health, requests=[], health_status=200)
    with pytest.raises(ValueError, match=r"it has shapes.checks \[\], this run \['right'\]"):
        connect(server.url, reward_model="shapes")


def test_pictures_of_every_mode_arrive_as_they_are(serve):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 4), dtype=np.uint8))
    modes = [
        (picture if "A" in mode else picture.convert("RGB")).convert(mode)
        for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "CMYK")
    ]
    spec = "jpeg_compressibility"
    here = build_reward_models(RewardSpecConfig(reward_model=spec), "cpu")
    there = connect(serve(spec), reward_model=spec)
    scores = [compute_reward(modes, ["a \U0001f642"] * 7, *models)[0] for models in (here, there)]
    np.testing.assert_array_equal(*scores)
    assert len(set(scores[0])) > 3


def test_a_judge_behind_servers_is_known_to_the_run_and_must_be_one(serve, chat_server):
    judges = [chat_server(lambda content: (200, {"Yes": 0.5, "No": 0.25})) for _ in range(2)]
    judges[1].models = ["another"]
    urls = [serve("vlm_judge", vlm_judge_url=judge.url) for judge in judges]
    models, _ = connect(urls[0], reward_model="vlm_judge")
    assert models["VLMJudgeModel"](PICTURES[:2], CAPTIONS[:2]) == pytest.approx([2 / 3] * 2)
    assert judge_of(models) == "judge"
    assert served_judge(RewardSpecConfig(reward_model="vlm_judge", reward_server=urls[1])) == "another"
    with pytest.raises(ValueError, match="its judge is another, that of another server judge"):
        connect(*urls, reward_model="vlm_judge")


def test_a_run_compares_pictures_at_a_server_and_knows_its_judge(train, flags, serve, chat_server, refused):
    judge, spec = chat_server(brighter), "pairwise,custom_rewards:place_in_group"
    given = {"reward_model": spec, "train_batch_size": 2, "max_train_steps": 1}
    here = train(**given, vlm_judge_url=judge.url)
    url = serve(spec, vlm_judge_url=judge.url)
    there = train(**given, reward_server=url, reward_batch_size=3, output_dir="there")
    assert there.numbers() == here.numbers()
    judge.models = ["another"]
    given |= {"reward_server": serve(spec, vlm_judge_url=judge.url), "resume_from_checkpoint": "latest"}
    with refused("--vlm_judge_model: not given; .* the judge judge, --reward_server serves another; name it to go on"):
        train_grpo_flux.main(flags(**given | {"max_train_steps": 2, "output_dir": there.folder}))


def test_whole_groups_travel_in_one_request(serve):
    spec = "custom_rewards:place_in_group"
    there, images, prompts = connect(serve(spec), reward_model=spec, reward_batch_size=4), PICTURES[:2] * 6, []
    groups = [number for number, size in enumerate((2, 2, 3, 5)) for _ in range(size)]
    prompts = [f"prompt {number}" for number in groups]
    batches, sent = [], there[0]["place_in_group"].servers._batches

    def watched(*given):
        batches.extend((batch.start, batch.stop) for batch in sent(*given))
        return sent(*given)

    there[0]["place_in_group"].servers._batches = watched
    here = build_reward_models(RewardSpecConfig(reward_model=spec), "cpu")
    mine, theirs = (compute_reward(images, prompts, *models, groups=groups)[0] for models in (here, there))
    np.testing.assert_array_equal(theirs, mine)
    assert batches == [(0, 4), (4, 7), (7, 12)] and len(set(mine)) > 2
    config = RewardSpecConfig(reward_model=spec)
    config.h = config.w = 32
    config.num_generations = 100
    with pytest.raises(ValueError, match="--num_generations 100: up to 100 pictures per request, the server takes 64"):
        check_limits("http://x", {"images": 64}, config, whole_groups=True)


@pytest.mark.parametrize("groups", [None, [0], [0, "1"], 3])
def test_a_request_without_groups_for_a_groupwise_reward_is_refused(serve, groups):
    spec = "custom_rewards:place_in_group"
    body = request("place_in_group", spec, images=[png(NOISE)] * 2, prompts=["a"] * 2)
    found = post(serve(spec), body | {"groups": groups})
    assert found.status_code == 400 and "groups: expected one number per image" in found.text


@pytest.mark.slow
def test_the_real_models_score_the_same_behind_a_server(serve, narrow_rewards):
    """Uses pictures of every size and mode, and prompts that are empty, long, or in other scripts."""
    paths = {
        "hps_path": str(narrow_rewards / "hps_ckpt" / HPS_FILE),
        "pick_score_path": str(narrow_rewards / PICK_SCORE_FOLDER),
        "image_reward_score_dir": str(narrow_rewards / "image_reward_ckpt"),
    }
    here = build_reward_models(RewardSpecConfig(reward_model="multi_reward", reward_batch_size=3, **paths), "cpu")
    url = serve("multi_reward", here[0], **paths)
    there = connect(url, reward_model="multi_reward", reward_batch_size=3)
    mine, theirs = (compute_reward(pictures(), PROMPTS, *models, 1, 4) for models in (here, there))
    assert len(mine[2]) == 6 and mine[1].all() and there[1] == here[1]
    for key, scores in mine[2].items():
        np.testing.assert_allclose(theirs[2][key], scores, rtol=0, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"quality": 40}, {"progressive": True}])
def test_jpegs_are_scored_as_they_are(serve, mode, options):
    picture = jpeg(NOISE.convert(mode), **options)
    body = request("JpegCompressibilityRewardModel", "jpeg_compressibility", images=[base64_of(picture), png(NOISE)])
    found = post(serve("jpeg_compressibility"), {**body, "prompts": ["a", "b"]}).json()["scores"]
    score = JpegCompressibilityRewardModel()
    expected = score([Image.open(io.BytesIO(picture)), NOISE], ["a", "b"])
    assert found == {"JpegCompressibilityRewardModel": expected} and expected[0] != expected[1]


def test_health_tells_what_is_served_while_one_request_at_a_time_is_scored(serve):
    scored, release, busy = threading.Semaphore(0), threading.Event(), []

    def slow(images, prompts):
        busy.append(threading.current_thread().name)
        scored.release()
        assert release.wait(TIME_LIMIT)
        return [0.5] * len(images)

    url = serve("shapes,custom_rewards:constant:0.5", {"ShapesRewardModel": None, "slow": slow})
    body = request("slow", "shapes,custom_rewards:constant:0.5")
    answers = []
    clients = [threading.Thread(target=lambda: answers.append(post(url, body))) for _ in range(2)]
    for client in clients:
        client.start()
    assert scored.acquire(timeout=TIME_LIMIT)
    health = httpx.get(f"{url}/health", timeout=TIME_LIMIT).json()
    assert not scored.acquire(timeout=0.3) and len(busy) == 1  # the other client waits
    release.set()
    for client in clients:
        client.join()
    assert health["status"] == "scoring"
    assert health["models"] == {"shapes": "ShapesRewardModel", "custom_rewards:constant": "slow"}
    settings = health["settings"]
    assert settings["shapes.weight"] == pytest.approx(2 / 3) and settings["shapes.schedule"] == "linear"
    assert settings["shapes.components"] == ["binding", "form", "clean"] and settings["shapes.checks"] == ["right"]
    assert settings["custom_rewards:constant.checks"] == [] and settings["evaluation"] is False
    assert settings["shapes.start_weights"] == [0.5, 0.3, 0.2]
    assert [found.json() for found in answers] == [{"scores": {"slow": [0.5]}}] * 2 and len(set(busy)) == 1


# --- trouble ----------------------------------------------------------------------------------------------------------

GARBAGE = [b"<html>", b"[]", b'{"scores": 5}', b'{"scores": {}}', b'{"scores": {"brightness": [1.0]}}', b"[" * 100000]
GARBAGE += [b'{"scores": {"brightness": ["1", "2"]}}', b'{"scores": {"brightness": [true, false]}}', b"\xff\x00"]
TROUBLES = [(500, b"oops"), (429, b"slow down"), (None, b""), *((200, garbage) for garbage in GARBAGE)]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_passing_trouble_is_retried_and_a_lasting_one_is_no_score(troubled, trouble, caplog):
    server = troubled(lambda body, number: trouble if number <= 2 else good(body))
    models, _ = connect(server.url, reward_server_retries=2)
    assert list(models["brightness"](PICTURES[:2], CAPTIONS[:2])) == [0.25, 0.75]
    assert len(server.requests) == 3 and "failed" not in caplog.text
    server.answer = lambda body, number: trouble
    assert np.isnan(models["brightness"](PICTURES[:2], CAPTIONS[:2])).all()
    assert len(server.requests) == 6 and "brightness: 1 of 1 requests failed" in caplog.text


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422])
def test_a_refusal_is_not_repeated_and_says_why(troubled, status, caplog, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 1e6)  # a pause would never end
    server = troubled(lambda body, number: (status, b"too much of it"))
    models, _ = connect(server.url.replace("http://", "http://user:secret@"), reward_server_retries=5)
    assert np.isnan(models["brightness"](PICTURES[:2], CAPTIONS[:2])).all()
    assert len(server.requests) == 1 and "secret" not in caplog.text
    assert f"brightness: 1 of 1 requests failed, e.g. {server.url}: HTTP {status} too much of it" in caplog.text


def test_what_one_server_refuses_another_may_score(troubled):
    refusing, scoring = troubled(lambda body, number: (413, b"too large")), troubled(good)
    models, _ = connect(refusing.url, scoring.url, reward_server_retries=0)
    assert models["brightness"](PICTURES[:1], CAPTIONS[:1]) == [0.25]
    scoring.answer = lambda body, number: (500, b"oops") if number < 4 else good(body)
    models, _ = connect(refusing.url, scoring.url, reward_server_retries=3)
    assert models["brightness"](PICTURES[:1], CAPTIONS[:1]) == [0.25]
    assert [len(server.requests) for server in (refusing, scoring)] == [2, 4]


@pytest.mark.parametrize("status,times", [(408, 3), (429, 3), (503, 3)])
def test_what_may_pass_is_repeated(troubled, status, times):
    server = troubled(lambda body, number: (status, b"not now"))
    models, _ = connect(server.url, reward_server_retries=2)
    assert np.isnan(models["brightness"](PICTURES[:1], CAPTIONS[:1])).all() and len(server.requests) == times


def test_something_else_than_a_reward_server_is_refused_at_once(troubled, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 1e6)
    server = troubled(good)
    server.health_status = 404
    with pytest.raises(ValueError, match="reward_server: no server answers, e.g. .*: HTTP 404"):
        connect(server.url, reward_server_retries=3)


def test_a_slow_server_times_out_and_one_batch_fails_alone(troubled):
    server = troubled(lambda body, number: (time.sleep(1) if body["prompts"] == ["slow"] else None, good(body))[1])
    models, _ = connect(server.url, reward_server_timeout=0.3, reward_server_retries=0, reward_batch_size=1)
    scores = models["brightness"](PICTURES[:2], [CAPTIONS[0], "slow"])
    assert scores[0] == 0.25 and np.isnan(scores[1])


def test_one_dead_url_of_three_costs_no_sample(troubled, caplog):
    servers = [troubled(good) for _ in range(3)]
    servers[1].shutdown()
    servers[1].server_close()
    models, _ = connect(*(server.url for server in servers), reward_server_retries=0, reward_batch_size=1)
    assert "the others go on without it" in caplog.text
    assert list(models["brightness"](PICTURES, CAPTIONS)) == [0.25] * 6
    assert [len(server.requests) for server in servers] == [2, 0, 4]


@pytest.mark.parametrize("rank,sp_size", [("1", 1), ("2", 2)])
def test_ranks_begin_at_different_servers(troubled, monkeypatch, rank, sp_size):
    servers = [troubled(good) for _ in range(2)]
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(RewardSpecConfig, "sp_size", sp_size, raising=False)
    connect(*(server.url for server in servers))[0]["brightness"](PICTURES, CAPTIONS)
    assert [len(server.requests) for server in servers] == [0, 1]


def test_a_reward_that_raises_is_failed_samples_and_the_server_goes_on(serve):
    def brittle(images, prompts):
        if "bad" in prompts:
            raise RuntimeError("on purpose")
        return [0.5] * len(images)

    url = serve("custom_rewards:brightness", {"brightness": brittle})
    models, _ = connect(url, reward_server_retries=0)
    assert np.isnan(models["brightness"](PICTURES[:1], ["bad"])).all()
    assert models["brightness"](PICTURES[:1], ["good"]).tolist() == [0.5]


# --- what a server refuses --------------------------------------------------------------------------------------------


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64_of(buffer.getvalue())


def header_only(width, height):
    """A PNG of a few bytes whose header claims width x height pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return base64_of(data)


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", **options)
    return buffer.getvalue()


def jpeg_that_says(width, height):
    """A JPEG of 8x8 pixels whose header claims width x height."""
    data = bytearray(jpeg(Image.new("RGB", (8, 8))))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def base64_of(data):
    return base64.b64encode(data).decode()


def request(model="brightness", spec="custom_rewards:brightness", **changes):
    settings = reward_settings(RewardSpecConfig(reward_model=spec), False)
    return {"settings": settings, "model": model, "images": [png(PICTURES[0])], "prompts": ["a"], **changes}


def post(url, body):
    return httpx.post(f"{url}/score", json=body, timeout=TIME_LIMIT)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
SMALL = png(Image.new("1", (1000, 1000)))  # 1 MB of pixels in some hundred bytes
SMALL_JPEG = base64_of(jpeg(Image.new("L", (1000, 1000))))
BAD = {
    "bomb": (413, {"images": [header_only(50000, 50000)]}),
    "large picture": (413, {"images": [png(Image.new("1", (3000, 1000)))]}),
    "large together": (413, {"images": [SMALL] * 3, "prompts": ["a"] * 3}),
    "too many": (413, {"images": [png(PICTURES[0])] * 5, "prompts": ["a"] * 5}),
    "truncated": (400, {"images": [header_only(8, 8)]}),
    "JPEG bomb": (413, {"images": [base64_of(jpeg_that_says(65000, 65000))]}),
    "large JPEG": (413, {"images": [base64_of(jpeg(Image.new("L", (3000, 1000))))]}),
    "PNG and JPEG together": (413, {"images": [SMALL, SMALL, SMALL_JPEG], "prompts": ["a"] * 3}),
    "truncated JPEG": (400, {"images": [base64_of(jpeg(NOISE)[:-200])]}),
    "JPEG header alone": (400, {"images": [base64_of(jpeg(NOISE)[:20])]}),
    "other format": (400, {"images": [base64_of(b"GIF89a, or so")]}),
    "settings of no kind": (400, {"settings": []}),
    "no base64": (400, {"images": ["ü"]}),
    "no picture": (400, {"images": [], "prompts": []}),
    "numbers": (400, {"images": [1]}),
    "prompts": (400, {"prompts": ["a", "b"]}),
    "model": (400, {"model": "other"}),
    "step": (400, {"curr_step": "3", "total_steps": 5}),
    "steps": (400, {"curr_step": [1, 2], "total_steps": 5}),
    "total": (400, {"curr_step": 1}),
    "negative total": (400, {"curr_step": 1, "total_steps": -1}),
    "settings": (409, {"settings": {}}),
}


def test_bad_requests_are_refused_and_good_ones_answered(serve):
    url = serve("custom_rewards:brightness", max_pixels=2_500_000, max_images=4, max_body_mb=1)
    found = {name: post(url, request(**changes)).status_code for name, (_, changes) in BAD.items()}
    assert found == {name: status for name, (status, _) in BAD.items()}
    for body in (b"", b"[]", b"[" * 100000, b"\xff", b"5"):
        assert httpx.post(f"{url}/score", content=body, headers={"Content-Type": "application/json"}).status_code == 400
    assert httpx.post(f"{url}/score", content=json.dumps(request())).status_code == 415
    assert post(url, request(images=[SMALL] * 2, prompts=["a"] * 2)).status_code == 200


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--reward_model hpsv2 --hps_path /no/where.pt", "--hps_path /no/where.pt: no such file"),
        ("--reward_model hps", "--reward_model 'hps': unknown reward"),
        (
            "--reward_model shapes --reward_server http://here:1",
            "--reward_server http://here:1: a server scores",
        ),
        ("--reward_model shapes --port 65536", "--port 65536: must be at least 0 and below 65536"),
        ("--reward_model shapes --reward_batch_size 0", "--reward_batch_size 0: must be at least 1"),
        ("--reward_model shapes --max_images 0", "--max_images 0: must be at least 1"),
    ],
)
def test_a_server_of_wrong_settings_does_not_start(capsys, flags, message):
    assert f": error: {message}" in refusal(capsys, server_main, flags.split())


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused(serve, declared):
    url = serve("custom_rewards:brightness", max_body_mb=1)
    body = json.dumps(request(prompts=["a" * 2**20])).encode()
    content = body if declared else (body[i : i + 65536] for i in range(0, len(body), 65536))
    answer = httpx.post(f"{url}/score", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "changed,message",
    [
        (
            {"reward_model": "shapes"},
            "it has reward_model ['custom_rewards:brightness', 'shapes'], this run ['shapes']",
        ),
        ({"reward_model": "shapes,custom_rewards:brightness"}, "it has shapes.weight 0.75, this run 0.5"),
        ({"granular_schedule": "linear"}, "it has shapes.schedule 'cosine', this run 'linear'"),
        (
            {"granular_start_weights": [1, 1, 1]},
            "it has shapes.start_weights [0.5, 0.3, 0.2], this run [1.0, 1.0, 1.0]",
        ),
        (
            {"reward_batch_size": 65},
            "--reward_batch_size 65: up to 65 pictures per request, the server takes 64; lower --reward_batch_size or "
            "start the server with --max_images 65",
        ),
        ({"reward_server_timeout": 0}, "--reward_server_timeout 0.0: must be above 0"),
    ],
)
def test_a_server_of_other_rewards_is_refused_before_training(train, run_at, process, capsys, changed, message):
    line = refusal(
        capsys,
        train,
        "out",
        **{"reward_model": SPEC, "granular_schedule": "cosine", "reward_server": process, **changed},
    )
    assert "--reward_server" in line and message in line
    assert not run_at("out").folder.exists()


@pytest.mark.parametrize(
    "limits,changed,message",
    [
        (
            {"max_pixels": 4 * 32 * 48 - 1},
            {},
            "--reward_batch_size 4 with --h 32 --w 48: up to 6144 pixels per request, the server takes 6143; "
            "lower --reward_batch_size or start the server with --max_pixels 6144",
        ),
        (
            {"max_body_mb": 1},
            {"h": 256, "w": 256, "reward_batch_size": 5},
            "--reward_batch_size 5 with --h 256 --w 256: up to",
        ),
    ],
)
def test_a_server_that_takes_less_than_training_sends_is_refused(
    train, run_at, serve, capsys, limits, changed, message
):
    spec = "custom_rewards:brightness"
    given = {"h": 32, "w": 48, "reward_batch_size": 4, "reward_model": spec, **changed}
    line = refusal(capsys, train, "out", reward_server=serve(spec, **limits), **given)
    assert message in line and "--reward_server http://127.0.0.1" in line
    assert ("--max_body_mb 2" in line) == ("max_body_mb" in limits)
    assert not run_at("out").folder.exists()


def test_what_the_check_of_limits_lets_pass_is_scored(serve):
    """Sends noise, which PNG can't compress, with as many pictures and pixels as the limits allow."""
    url = serve("custom_rewards:brightness", max_body_mb=1, max_images=3, max_pixels=3 * 300 * 280)
    config = SimpleNamespace(reward_batch_size=3, h=300, w=280)
    check_limits(url, httpx.get(f"{url}/health").json()["limits"], config)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 280, 3), dtype=np.uint8))
    assert post(url, request(images=[to_base64_png(noise)] * 3, prompts=["\U0001f642" * 600] * 3)).status_code == 200
    config.w += 1
    with pytest.raises(ValueError, match="pixels"):
        check_limits(url, httpx.get(f"{url}/health").json()["limits"], config)


def test_an_evaluation_refuses_a_server_for_training(process):
    with pytest.raises(ValueError, match="it has evaluation False, this run True"):
        connect(process, reward_model=SPEC, granular_schedule="cosine", evaluation=True)


def test_a_server_that_changed_its_rewards_gives_no_scores(serve, troubled):
    known = troubled(good)
    models, _ = connect(known.url, reward_server_retries=0)
    models["brightness"].servers.urls = [serve("custom_rewards:brightness,shapes")]
    assert np.isnan(models["brightness"](PICTURES, CAPTIONS)).all()


@pytest.mark.parametrize(
    "url,message",
    [
        ("localhost:8100", "reward_server localhost:8100: must start with http"),
        ("user:secret@here:8100", "reward_server here:8100: must start with http"),
        ("http://user:sec/ret@here:8100", "reward_server http://here:8100: not a URL"),
        (",", "no URL in it"),
    ],
)
def test_a_wrong_url_is_refused_without_its_password(url, message):
    with pytest.raises(ValueError, match=message) as error:
        connect(url)
    assert "sec" not in str(error.value)


def test_no_server_at_all_is_an_error_without_its_password(troubled):
    server = troubled(good)
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=f"reward_server: no server answers, e.g. {server.url}: ") as error:
        connect(server.url.replace("http://", "http://user:secret@"), reward_server_retries=1)
    assert "secret" not in str(error.value) and "user" not in str(error.value)


# --- --max_reward_failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, None])
def test_a_server_lost_during_training_stops_the_run_or_is_counted(train, run_at, troubled, capsys, limit):
    server = troubled(lambda body, number: good(body) if number == 1 else (500, b"lost"))
    flags = dict(reward_model="custom_rewards:brightness", reward_server=server.url, reward_server_retries=0)
    flags |= dict(max_train_steps=3, checkpointing_steps=1, max_reward_failures=limit)
    if limit is None:
        run = train("out", **flags)
        assert len(run.metrics) == 3
    else:
        with pytest.raises(SystemExit) as stop:
            train("out", **flags)
        assert stop.value.code == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert "iteration 2 than --max_reward_failures 0 (4 failed_rewards, 4 failed_brightness)" in line
        assert f": look at {server.url}, where" in line
        run = run_at("out")
        assert len(run.metrics) == 2
    assert [line["failed_brightness"] for line in run.metrics[:2]] == [0, 4]
    assert [line["optimizer_steps"] for line in run.metrics[:2]] == [2, 0] and run.metrics[1]["reward"] is None
    assert same_weights(run.weights(0), run.weights(-1))  # the trained weights are kept


def test_a_server_that_dies_is_named_at_the_end_with_how_to_resume(train, run_at, troubled, capsys):
    server = troubled(lambda body, number: good(body) if number == 1 else (500, b"lost"))
    with pytest.raises(SystemExit):
        train(
            "out", reward_model="custom_rewards:brightness", reward_server=server.url, reward_server_retries=0,
            max_train_steps=4, max_skipped_steps=3,
        )  # fmt: skip
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"no score came for any picture, the last time in iteration 3: look at {server.url}, where" in line
    assert "--resume_from_checkpoint latest continues" in line and "non-finite" not in line
    assert len(run_at("out").metrics) == 3


@pytest.mark.parametrize("limit", [0, 1])
def test_so_many_failures_are_allowed_and_not_one_more(train, run_at, tiny_flux, limit):
    flags = dict(reward_model="custom_rewards:first_of_each_batch_fails", max_reward_failures=limit)
    if limit == 1:
        assert [line["failed_rewards"] for line in train("out", **flags).metrics] == [1, 1]
        return
    with pytest.raises(SystemExit):
        train("out", **flags)
    (line,) = run_at("out").metrics
    assert line["failed_rewards"] == 1 and line["optimizer_steps"] == 0 and math.isfinite(line["reward"])
    assert same_weights(run_at("out").weights(), base_weights(tiny_flux))


def test_an_address_that_cannot_be_had_is_refused_before_models_load(monkeypatch, capsys):
    monkeypatch.setattr("fastvideo.models.reward_model.server.build_reward_models", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags, named in (
            (["--port", str(port)], f"--port {port}: "),
            (["--host", "192.0.2.1"], "--host 192.0.2.1: "),
        ):
            with pytest.raises(SystemExit) as stop:
                server_main(["--reward_model", "shapes", *flags])
            (line,) = capsys.readouterr().err.splitlines()
            assert stop.value.code == 2 and f"server.py: error: {named}" in line
