"""UnifiedReward against a real HTTP server on the loopback."""

import base64
import io
import time

from fastvideo.models.reward_model.chat import Answer
from fastvideo.models.reward_model.network import ask_in_turn
from fastvideo.models.reward_model.unified_reward import QUESTIONS, UnifiedRewardModel

import numpy as np
import pytest
from PIL import Image
from reward_checkpoints import PROMPTS, pictures
from reward_servers import QuietHandler


def red(level):
    return Image.new("RGB", (8, 8), (level, 0, 0))


def red_of(content):
    """Mean red of the picture in a request."""
    header, data = content[0]["image_url"]["url"].split(",", 1)
    assert header == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).getpixel((4, 4))[0]


def test_each_image_gets_the_score_of_its_own_reply(chat_server):
    server = chat_server(lambda content: (200, f"Fine.\nAlignment Score (1-5): {1 + red_of(content) // 50}"))
    model = UnifiedRewardModel(server.url, num_workers=4)
    scores = model([red(20), red(70), red(120), red(170), red(220)], ["a", "b", "c", "d", "e {x}"])
    np.testing.assert_array_equal(scores, [1, 2, 3, 4, 5])
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "UnifiedReward" and body["temperature"] == 0
    assert "Authorization" not in headers
    texts = {body["messages"][0]["content"][1]["text"] for _, _, body in server.requests}
    assert any("Prompt: e {x}\n" in text for text in texts) and len(texts) == 5


def test_pictures_of_every_size_and_mode_and_any_prompt_arrive(chat_server):
    def size(content):
        width, height = Image.open(io.BytesIO(base64.b64decode(content[0]["image_url"]["url"].split(",", 1)[1]))).size
        return 200, f"Alignment Score (1-5): {1 + width * height % 997 / 250}"

    server = chat_server(size)
    scores = UnifiedRewardModel(server.url, num_workers=3)(pictures(), PROMPTS)
    assert scores.tolist() == [1 + p.width * p.height % 997 / 250 for p in pictures()]
    asked = {body["messages"][0]["content"][1]["text"] for _, _, body in server.requests}
    assert asked == {QUESTIONS["semantic"].format(prompt=prompt) for prompt in PROMPTS}


def test_one_text_is_the_prompt_of_all_pictures(chat_server):
    server = chat_server(lambda content: (200, "Alignment Score (1-5): 4"))
    assert UnifiedRewardModel(server.url)([red(0)] * 3, "cat").tolist() == [4, 4, 4]
    asked = {body["messages"][0]["content"][1]["text"] for _, _, body in server.requests}
    assert asked == {QUESTIONS["semantic"].format(prompt="cat")}


def test_the_key_comes_from_the_environment(chat_server, monkeypatch):
    monkeypatch.setenv("UNIFIED_REWARD_API_KEY", "secret")
    server = chat_server(lambda content: (200, "Final Score: 4.5"))
    model = UnifiedRewardModel(f"{server.url}/v1/", question_type="score")
    assert model([red(0)], ["a"]).tolist() == [4.5]
    assert server.requests[0][0] == "/v1/chat/completions"
    assert server.requests[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "reply,question_type,score",
    [
        ("Alignment Score (1-5): 4", "semantic", 4.0),
        ("**Alignment Score (1-5):** 3.5", "semantic", 3.5),
        ("Alignment Score (1-5): 1\n... after all:\nalignment score (1-5): 2", "semantic", 2.0),
        ("Final Score: 5", "score", 5.0),
        ("Final Score: **4**", "score", 4.0),
        ("Final Score: 4/5", "score", 4.0),
        ("Alignment Score (1-5): 7", "semantic", None),
        ("Alignment Score (1-5): 0", "semantic", None),
        ("Alignment Score (1-5): -3", "semantic", None),
        ("Alignment Score (1-5): high", "semantic", None),
        ("Final Score: 4", "semantic", None),
        ("I would give it 4 of 5.", "score", None),
        ("", "score", None),
    ],
)
def test_scores_are_read_only_from_the_asked_format(reply, question_type, score):
    template = UnifiedRewardModel("http://127.0.0.1:9", question_type).template
    if score is None:
        with pytest.raises(ValueError):
            template.read(Answer(reply))
    else:
        assert template.read(Answer(reply)) == score


@pytest.mark.parametrize("trouble", [(500, b"oops"), (429, b"slow down"), (None, b""), (200, b"<html>"), (200, b"{}")])
def test_a_passing_trouble_is_retried(chat_server, trouble):
    answers = iter([trouble, trouble])
    server = chat_server(lambda content: next(answers, (200, "Alignment Score (1-5): 3")))
    model = UnifiedRewardModel(server.url, retries=2, backoff=0.001)
    assert model([red(0)], ["a"]).tolist() == [3.0]
    assert len(server.requests) == 3


def test_a_lasting_trouble_is_a_failed_sample_and_not_a_score(chat_server, caplog):
    server = chat_server(lambda content: (500, b"oops") if red_of(content) > 100 else (200, "Alignment Score (1-5): 3"))
    url = server.url.replace("http://", "http://user:secret@")
    model = UnifiedRewardModel(url, num_workers=2, retries=1, backoff=0.001)
    scores = model([red(20), red(220), red(30)], ["a", "b", "c"])
    np.testing.assert_array_equal(scores, [3, np.nan, 3])
    assert len(server.requests) == 4
    assert "1 of 3 samples failed" in caplog.text and "HTTP 500" in caplog.text and "secret" not in caplog.text


def test_a_refusal_fails_at_once_with_the_server_s_words(chat_server, caplog):
    server = chat_server(lambda content: (400, b"the prompt is too long"))
    url = server.url.replace("http://", "http://user:secret@")
    assert np.isnan(UnifiedRewardModel(url, retries=5)([red(0)], ["a"])).all()
    assert len(server.requests) == 1
    assert f"{server.url}/v1/chat/completions: " in caplog.text and "HTTP 400 the prompt is too long" in caplog.text
    assert "secret" not in caplog.text and "user:" not in caplog.text


def test_an_unreadable_reply_fails_at_once(chat_server, caplog):
    server = chat_server(lambda content: (200, "a lovely picture"))
    assert np.isnan(UnifiedRewardModel(server.url, retries=5)([red(0)], ["a"])).all()
    assert len(server.requests) == 1  # temperature 0: the answer would be the same
    assert "a lovely picture" in caplog.text


def test_a_slow_server_times_out(chat_server):
    server = chat_server(lambda content: (time.sleep(0.5), (200, "Alignment Score (1-5): 3"))[1])
    assert np.isnan(UnifiedRewardModel(server.url, timeout=0.05, retries=0)([red(0)], ["a"])).all()


def test_one_dead_url_of_three_costs_no_sample(chat_server):
    good = [chat_server(lambda content: (200, "Alignment Score (1-5): 4")) for _ in range(2)]
    dead = chat_server(lambda content: (200, ""))
    dead.server_close()
    urls = ",".join([good[0].url, dead.url, good[1].url])
    scores = UnifiedRewardModel(urls, num_workers=3, retries=1, backoff=0.001)([red(0)] * 6, ["a"] * 6)
    assert scores.tolist() == [4.0] * 6
    assert [len(server.requests) for server in good] == [2, 4]


def test_ranks_start_at_different_urls(chat_server, monkeypatch):
    servers = [chat_server(lambda content: (200, "Alignment Score (1-5): 4")) for _ in range(2)]
    monkeypatch.setenv("RANK", "1")
    UnifiedRewardModel(",".join(server.url for server in servers))([red(0)], ["a"])
    assert [len(server.requests) for server in servers] == [0, 1]


def test_requests_run_at_the_same_time_up_to_num_workers(chat_server):
    server = chat_server(lambda content: (time.sleep(0.05), (200, "Alignment Score (1-5): 3"))[1])
    assert np.isfinite(UnifiedRewardModel(server.url, num_workers=3)([red(0)] * 9, ["a"] * 9)).all()
    assert 2 <= server.most_busy <= 3


@pytest.mark.parametrize(
    "urls,question_type,message",
    [
        ("", "semantic", "unified_reward_url '': no URL in it"),
        ("localhost:8080", "semantic", "must start with http:// or https://"),
        ("http://localhost:1", "style", "unified_reward_default_question_type 'style': choose from semantic, score"),
    ],
)
def test_wrong_settings_are_refused(urls, question_type, message):
    with pytest.raises(ValueError, match=message):
        UnifiedRewardModel(urls, question_type)


def test_a_key_in_the_url_stays_in_its_query_and_goes_to_no_other_server(chat_server, http_server, caplog):
    server = chat_server(lambda content: (200, "Alignment Score (1-5): 4"))
    assert UnifiedRewardModel(f"{server.url}/v1?api_key=hush")([red(0)], ["x"]).tolist() == [4]
    assert server.requests[0][0] == "/v1/chat/completions?api_key=hush"

    class Elsewhere(QuietHandler):
        def do_POST(self):
            self.read_json()
            self.reply(307, b"moved, and your key was hush", {"Location": server.url})

    moved = http_server(Elsewhere)
    assert np.isnan(UnifiedRewardModel(f"{moved.url}/v1?api_key=hush&x=1")([red(0)], ["x"])).all()
    assert len(server.requests) == 1 and "api_key=***" in caplog.text and "HTTP 307" in caplog.text


def test_pauses_between_attempts_stay_short(monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)

    def send(url: str) -> None:
        raise ValueError("no")

    assert ask_in_turn(send, ["http://a"], 0, 30, 0.5)[0] is None
    assert len(pauses) == 30 and max(pauses) <= 90
