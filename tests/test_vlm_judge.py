"""Any vision-language model as judge, against a real HTTP server on the loopback."""

import json
import math

from fastvideo.eval import eval_reward
from fastvideo.models.reward_model.chat import Answer
from fastvideo.models.reward_model.spec import RewardSpecConfig
from fastvideo.models.reward_model.utils import build_reward_models, check_reward_files
from fastvideo.models.reward_model.vlm_judge import PAIR, SINGLE, TEMPLATES, Template, VLMJudgeModel, read_template
from fastvideo.train_grpo_flux import main

import numpy as np
import pytest
from conftest import PROMPTS
from PIL import Image
from test_reward_training import mark
from test_unified_reward import red, red_of


def chances(content):
    """The judge believes in red pictures."""
    return 200, {"Yes": 0.1 + 0.8 * red_of(content) / 255, "No": 0.05, "Maybe": 0.01}


def test_yes_and_no_give_the_probability_of_yes(chat_server, monkeypatch):
    monkeypatch.setenv("VLM_JUDGE_API_KEY", "a-secret-key")
    server = chat_server(chances)
    model = VLMJudgeModel(f"{server.url}/v1/", num_workers=3)
    levels = [0, 100, 200, 255]
    scores = model([red(level) for level in levels], ["a {x}", "b", "c", "d"])
    believed = np.array([0.1 + 0.8 * level / 255 for level in levels])
    np.testing.assert_allclose(scores, believed / (believed + 0.05), atol=0.01)  # JPEG changes the level
    _, headers, body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 1)
    assert body["logprobs"] is True and body["top_logprobs"] == 20
    assert headers["Authorization"] == "Bearer a-secret-key"
    assert any("a {x}" in body["messages"][0]["content"][1]["text"] for _, _, body in server.requests)


@pytest.mark.parametrize(
    "first_words,probability",
    [
        ({"yes": 0.3, " YES": 0.3, "No": 0.2, "▁no": 0.1, "Nope": 0.1}, 2 / 3),
        ({"Yes": 1e-9, "Maybe": 0.9}, 1.0),
        ({"**No**": 0.9}, 0.0),
        ({"<think>": 1.0}, None),
    ],
)
def test_all_spellings_of_yes_and_no_count(first_words, probability):
    top = [{"token": token, "logprob": math.log(p)} for token, p in first_words.items()]
    answer = Answer("x", {"content": [{"top_logprobs": top}]})
    template = Template("{prompt}", "yes or no")
    if probability is None:
        with pytest.raises(ValueError, match="neither yes nor no among the likely first words"):
            template.read(answer)
    else:
        assert template.read(answer) == pytest.approx(probability)


@pytest.mark.parametrize(
    "name,reply,expected",
    [
        ("rating_10", "A hand has six fingers.\nRating: 7", 7),
        ("rating_10", "Rating: 2. No, it is better.\n**Rating:** 8.5", 8.5),
        ("rating_10", "I rate it 7 of 10.", None),
        ("rating_10", "Rating: 11", None),
        ("rating_10", "Rating: -3", None),
        ("rating_10", "Rating: 2/10? No.\n**Rating:** `8,5` / 10, for 2 faults", 8.5),
        ("rating_10", "Rating: 4/5", None),
        ("unified_reward_2", "Alignment Score (1-5): 4.5\nCoherence Score (1-5): 3\nStyle Score (1-5): 3", 3.5),
        ("unified_reward_2", "Alignment Score (1-5): 4.5\nStyle Score (1-5): 3", None),
        ("pairwise", "The second has a cat.\nBetter: 2", 0),
        ("pairwise", "**Better:** Image 1", 1),
        ("pairwise", "better: Tie", 0.5),
        ("pairwise", "Better: 12", None),
        ("pairwise", "Better：２", 0),
        ("unified_reward_think", "<think>Image 1: 7=7</think>\n<answer>Image 2 is better</answer>", 0),
        ("unified_reward_think", "<think>Image 1 is better</think>", None),
        ("unified_reward_flex", '{"categories": [{"cat_winner": "Image 2"}], "winner": "Image 1"}', 1),
        ("unified_reward_flex", '{"winner": "Image 1/2"}', None),
    ],
)
def test_answers_are_read_only_from_the_form_that_was_asked_for(name, reply, expected):
    template = read_template(name, "vlm_judge_template", SINGLE + PAIR)
    if expected is None:
        with pytest.raises(ValueError):
            template.read(Answer(reply))
    else:
        assert template.read(Answer(reply)) == expected


@pytest.mark.parametrize(
    "reply,number",
    [
        ("8/10", 8),
        ("**8** / 10 (for 2 faults)", 8),
        ("I'd say 8 out of 10.", 8),
        ("8 of 10 points", 8),
        ("3 of 5 things are right: 8", 8),
        ("Score: 8.5", 8.5),
        ("评分：８", 8),
        ("4/5", None),
        ("85%", None),
        ("eight", None),
    ],
)
def test_the_end_of_a_scale_is_no_score(reply, number):
    template = Template("{prompt}", "number", (1, 10))
    if number is None:
        with pytest.raises(ValueError, match="^(no number from 1 to 10|nothing to read)"):
            template.read(Answer(reply))
    else:
        assert template.read(Answer(reply)) == number


def test_every_shipped_template_can_be_read_and_is_named_where_it_can_be_used():
    for path in TEMPLATES.iterdir():
        template = read_template(path.stem, "x", SINGLE + PAIR)
        assert all(label in template.question for label in template.labels)
        assert "a cat {x}" in template.ask([], "a cat {x}").text


def test_a_template_from_a_word_processor_works(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("answer: number 1 to 10 after “My rating:”\r\nRate {prompt}.\r\n".encode("utf-8-sig"))
    assert read_template(str(path), "x", SINGLE).read(Answer("My rating: 7")) == 7


def test_a_judge_that_answers_under_another_name_is_told(chat_server, caplog):
    names = iter(["judge-2026-01", "judge-2026-01", "judge-2026-02", "judge-2026-02", "judge-2026-01"])
    choice = {"message": {"content": "Rating: 7"}}
    server = chat_server(lambda content: (200, json.dumps({"model": next(names), "choices": [choice]}).encode()))
    model = VLMJudgeModel(server.url, template="rating_10")
    for _ in range(5):
        model([red(9)], ["a"])
    assert caplog.text.count("the judge: judge-2026-02 answers now, before it was judge-2026-01;") == 1
    assert caplog.text.count("answers now") == 1


def test_a_template_of_one_s_own_asks_its_question(chat_server, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text('answer: number 0 to 100\nHow much red, {"in": "percent"}, for {prompt}?\n', encoding="utf-8")
    server = chat_server(lambda content: (200, f"<think>50?</think> {100 * red_of(content) / 255:.1f}"))
    scores = VLMJudgeModel(server.url, template=str(path))([red(0), red(255)], "a rose")
    np.testing.assert_allclose(scores, [0, 100], atol=1)
    assert server.requests[0][2]["messages"][0]["content"][1]["text"] == 'How much red, {"in": "percent"}, for a rose?'
    assert "logprobs" not in server.requests[0][2]


# What is wrong -> settings, what the server does, the line.
WRONG = {
    "no URL": ({"vlm_judge_url": None}, {}, "vlm_judge_url: not given; vlm_judge needs the URL of its server"),
    "no template": (
        {"vlm_judge_template": "what"},
        {},
        "vlm_judge_template what: No such file .* choose from pairwise, ",
    ),
    "no {prompt}": ({"template": "answer: yes or no\nNice?"}, {}, r"vlm_judge_template \S*: no {prompt} in it"),
    "no form": (
        {"template": "Is it {prompt}?"},
        {},
        "vlm_judge_template .*its first line is 'Is it {prompt}.', not of",
    ),
    "no label": ({"template": "answer: image 1 or 2\n{prompt}"}, {}, "vlm_judge_template .*its first line is"),
    "a bad range": ({"template": "answer: number 5 to 1\n{prompt}"}, {}, "vlm_judge_template .*its first line is"),
    "pairs": ({"vlm_judge_template": "pairwise"}, {}, "vlm_judge_template pairwise: its answer is image 1 or 2; this"),
    "unreachable": (
        {},
        {"dead": True},
        r"vlm_judge_url: no endpoint says what it serves, e.g. http://127.0.0.1:\S+: no server answers at this address "
        r"\(connection refused\); start it, or correct the URL$",
    ),
    "a web page": (
        {},
        {"list": b"<html>\nlogin"},
        r"vlm_judge_url: no endpoint says .* no answer of an OpenAI-compatible endpoint: '<html>.nlogin'; if .* name",
    ),
    "a web page for an answer": (
        {"vlm_judge_model": "judge"},
        {"list": b"", "reply": (200, b"<html>")},
        "vlm_judge_url: a question about a grey picture failed: .*no answer of an OpenAI-compatible endpoint: '<html>'",
    ),
    "several models": ({}, {"models": ["a", "b"]}, r"vlm_judge_model: not given; http\S* serves a, b$"),
    "many models": ({}, {"models": [*map(str, range(300))]}, r"vlm_judge_model: .* serves 0, .* 9 and 290 more$"),
    "no such model": ({"vlm_judge_model": "c"}, {}, r"vlm_judge_model c: http\S* serves judge"),
    "no logprobs": (
        {},
        {"reply": "Yes"},
        r"vlm_judge_url http\S*: the endpoint gives no log-probabilities .*; or ask for a number, as .* rating_10",
    ),
    "too many logprobs": (
        {},
        {"reply": (400, b"top_logprobs: at most 5")},
        "vlm_judge_url: a question .* failed: .* at most 5; or ask for a number, as --vlm_judge_template rating_10 ",
    ),
    "no pictures": (
        {},
        {"reply": (400, b"text only")},
        "vlm_judge_url: a question about a grey picture failed: .*text",
    ),
    "neither": (
        {},
        {"reply": {"<think>": 1.0}},
        r"vlm_judge_url http\S*: neither yes nor no among .* \['<think>'\]; .* off at the server; or .* rating_10",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_judge_is_said_in_one_line_before_anything_loads(name, chat_server, tmp_path):
    settings, server_does, message = WRONG[name]
    reply = server_does.get("reply", {"Yes": 0.5, "No": 0.5})
    server = chat_server(lambda content: reply if isinstance(reply, tuple) else (200, reply))
    server.models, server.list = server_does.get("models", server.models), server_does.get("list")
    if "dead" in server_does:
        server.server_close()
    given = {"vlm_judge_url": server.url, "vlm_judge_retries": 0} | settings
    if template := given.pop("template", None):
        given["vlm_judge_template"] = str(tmp_path / "template.txt")
        (tmp_path / "template.txt").write_text(template, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{message}"):
        check_reward_files(RewardSpecConfig(reward_model="vlm_judge", **given))


def test_a_vendor_that_lists_no_models_serves_the_one_that_is_named(chat_server, caplog):
    server = chat_server(chances)
    server.list = b'{"error": "no such route"}'
    given = {"vlm_judge_url": server.url, "vlm_judge_model": "vendor/vl-max", "vlm_judge_retries": 0}
    model = build_reward_models(RewardSpecConfig(reward_model="vlm_judge", **given), "cpu")[0]["VLMJudgeModel"]
    assert np.isfinite(model([red(9)], ["a"])).all() and model.judge == "vendor/vl-max"
    assert {body["model"] for _, _, body in server.requests} == {"vendor/vl-max"}
    assert "--vlm_judge_model vendor/vl-max is taken as it is" in caplog.text


def test_a_key_in_the_environment_may_end_in_a_line_break_and_is_never_shown(chat_server, monkeypatch, caplog):
    server = chat_server(lambda content: (401, b"wrong key sk-verysecret"))
    config = RewardSpecConfig(reward_model="vlm_judge", vlm_judge_url=server.url, vlm_judge_retries=0)
    monkeypatch.setenv("VLM_JUDGE_API_KEY", "sk-verysecret\r\n")
    with pytest.raises(ValueError, match="HTTP 401 wrong key ") as error:
        check_reward_files(config)
    assert server.requests[0][1]["Authorization"] == "Bearer sk-verysecret"
    assert "verysecret" not in str(error.value) + caplog.text
    assert str(error.value).endswith("refuses the key in the environment variable VLM_JUDGE_API_KEY")
    monkeypatch.delenv("VLM_JUDGE_API_KEY")
    server.list_status = 401
    with pytest.raises(ValueError, match="put the server's key into .* VLM_JUDGE_API_KEY, which isn't set$"):
        VLMJudgeModel(server.url, retries=0)
    monkeypatch.setenv("VLM_JUDGE_API_KEY", "sk-verysécret")
    with pytest.raises(ValueError, match="vlm_judge_url: the environment variable VLM_JUDGE_API_KEY has char") as error:
        VLMJudgeModel(server.url)
    assert "verys" not in str(error.value)


def test_proxies_are_for_other_machines_only_and_one_that_can_t_be_used_is_one_line(chat_server, monkeypatch):
    server = chat_server(chances)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "gopher://me:hush@proxy:70")
    assert np.isfinite(VLMJudgeModel(server.url, retries=0)([red(9)], ["a"])).all()
    for reward, field in (("vlm_judge", "vlm_judge_url"), ("shapes", "reward_server")):
        config = RewardSpecConfig(reward_model=reward, **{field: "http://judge.invalid"})
        with pytest.raises(
            ValueError, match=rf"^{field}: the environment's proxies \(.*can't be used: .*gopher"
        ) as error:
            check_reward_files(config)
        assert "hush" not in str(error.value)


def test_an_answer_to_the_trial_that_can_t_be_read_is_shown(chat_server, capsys):
    server = chat_server(lambda content: (200, "I rate it 7"))
    config = RewardSpecConfig(reward_model="vlm_judge", vlm_judge_url=server.url, vlm_judge_template="rating_10")
    check_reward_files(config)
    assert "note: the judge's answer about a grey picture can't be read" in capsys.readouterr().err


def test_one_dead_endpoint_of_two_costs_no_sample(chat_server, caplog, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    good, dead = chat_server(chances), chat_server(chances)
    dead.server_close()
    url = f"{dead.url.replace('http://', 'http://user:password@')},{good.url}"
    config = RewardSpecConfig(reward_model="vlm_judge", vlm_judge_url=url, vlm_judge_retries=1)
    models, _ = build_reward_models(config, "cpu")
    assert np.isfinite(models["VLMJudgeModel"]([red(9)] * 4, ["a"] * 4)).all()
    assert "the others go on without it" in caplog.text and "password" not in caplog.text


def test_a_run_records_its_judge_and_goes_on_with_another_only_if_it_is_named(
    train, flags, chat_server, refused, tmp_path, capsys
):
    """In a mix, with failed samples."""
    server = chat_server(lambda content: (200, f"Rating: {mark(content) if mark(content) < 2.35 else 'none'}"))
    given = {"reward_model": "vlm_judge:3,jpeg_compressibility", "vlm_judge_url": server.url, "checkpointing_steps": 1}
    given |= {"vlm_judge_template": "rating_10", "output_dir": "out"}
    run = train(**given, max_train_steps=1)
    asked = [body["messages"][0]["content"][1]["text"] for _, _, body in server.requests]
    assert len(asked) == 5 and len(set(asked)) == 2 and any(p in asked[-1] for p in PROMPTS)  # a trial, then 4 pictures
    (line,) = run.metrics
    assert line["failed_rewards"] == line["failed_VLMJudgeModel"] < 4 and math.isfinite(line["reward_VLMJudgeModel"])
    settings = json.loads((run.folder / "args.json").read_text())
    assert settings["reward_names"]["VLMJudgeModel"]["judge"] == "judge"
    assert json.loads((run.checkpoints[0] / "checkpoint.json").read_text())["judge"] == "judge"

    given |= {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    for server.models, server.root, name in ((["another"], None, "another"), (["judge"], "/new", r"judge \(/new\)")):
        with refused(
            f"--vlm_judge_model: not given; .*was trained with the judge judge, --vlm_judge_url serves {name};"
        ):
            main(flags(**given | {"output_dir": run.folder}))
    server.models, server.root = ["another"], None
    capsys.readouterr()
    train(**given, vlm_judge_model="another")
    assert len(run.metrics) == 2 and server.requests[-1][2]["model"] == "another"
    assert "with the judge another; before, it was judge\n" in capsys.readouterr().err
    server.models = ["judge", "another"]
    with refused("--vlm_judge_model: not given; http.* serves judge, another"):
        main(flags(**given | {"output_dir": run.folder, "max_train_steps": 3}))


def test_an_evaluation_asks_the_judge(chat_server, tmp_path):
    server = chat_server(chances)
    for i, level in enumerate((0, 255)):
        red(level).save(tmp_path / f"{i}.png")
    entries = [{"image": f"{i}.png", "prompt": "a rose"} for i in range(2)]
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    command = ["--manifest", str(tmp_path / "manifest.json"), "--vlm_judge_url", server.url]
    assert eval_reward.main([*command, "--reward_model_type", "vlm_judge"]) == 0
    scores = [entry["reward"]["VLMJudgeModel"] for entry in json.loads((tmp_path / "manifest_scores.json").read_text())]
    np.testing.assert_allclose(scores, [0.1 / 0.15, 0.9 / 0.95], atol=0.01)


def test_pictures_of_every_mode_arrive(chat_server):
    server = chat_server(lambda content: (200, f"Rating: {1 + 9 * red_of(content) / 255}"))
    modes = [Image.new(mode, (9, 9)) for mode in ("RGB", "RGBA", "L", "1", "P", "CMYK")]
    scores = VLMJudgeModel(server.url, template="rating_10")(modes, "a")
    assert scores.tolist() == [1, 1, 1, 1, 1, 10]  # CMYK's zero is white


def test_a_run_asks_each_prompt_s_own_questions(train, flags, chat_server, tmp_path, refused, prompts_file):
    """In a mix with the judge, without failed samples."""
    server = chat_server(lambda content: (200, {"Yes": mark(content) / 5, "No": 1 - mark(content) / 5}))
    given = {"reward_model": "vlm_judge,vlm_questions", "vlm_judge_url": server.url, "max_train_steps": 1}
    prompts = [{"prompt": prompt, "questions": [f"Is it {prompt}?", "Is it?"]} for prompt in PROMPTS[:2]]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (line,) = train(**given, prompts_file=tmp_path / "prompts.json", train_batch_size=2).metrics
    assert line["failed_rewards"] == 0 and line["grad_norm"] > 0 and 0 <= line["reward_VLMQuestionsModel"] <= 1
    asked = [body["messages"][0]["content"][1]["text"] for _, _, body in server.requests]
    assert len(asked) == 2 + 8 + 16 and all(
        sum(f"Is it {prompt}?" in text for text in asked) == 4 for prompt in PROMPTS[:2]
    )
    with refused("--prompts_file .*: no prompt has questions, which the reward vlm_questions needs"):
        main(flags(**given, prompts_file=prompts_file))
