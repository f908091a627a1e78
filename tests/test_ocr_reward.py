"""The reward for text in pictures: which texts a prompt asks for, and what the real engine reads in drawn words."""

import importlib.util
import json
import sys

from fastvideo import train_grpo_flux
from fastvideo.eval import eval_reward
from fastvideo.models.reward_model.ocr import OCRRewardModel, quoted_texts, text_score
from fastvideo.models.reward_model.utils import check_reward_files

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw, ImageFont
from test_reward_registry import config

SIGN = 'a shop sign that says "OPEN LATE"'


def words(text: str, size: int = 40, colour: str = "black") -> Image.Image:
    """A picture of 256x256 pixels with the text on white."""
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).multiline_text((20, 60), text, colour, ImageFont.load_default(size))
    return image


def covered(image: Image.Image, share: float) -> Image.Image:
    """The picture with the right share of its text covered in white."""
    image = image.copy()
    left, _, right, _ = ImageDraw.Draw(image).textbbox((20, 60), "OPEN LATE", ImageFont.load_default(40))
    ImageDraw.Draw(image).rectangle((right - share * (right - left), 0, 256, 256), "white")
    return image


@pytest.fixture(scope="module")
def model() -> OCRRewardModel:
    return OCRRewardModel(num_workers=2)


@pytest.mark.parametrize(
    "prompt,expected",
    [
        (SIGN, ["OPEN LATE"]),
        ('a "PUSH" door, a "PULL" door, and a second "PUSH" door', ["PUSH", "PULL"]),
        (
            "“curly”, „low“, «angled», ‘single’ and 「出口」『入口』",
            ["curly", "low", "angled", "single", "出口", "入口"],
        ),
        ("写着“营业中”、‘开’和'关'的牌子，上面有＂门＂和3“张”", ["营业中", "开", "关", "门", "张"]),
        ("写着‘营业中’的牌子和'出口'。", ["营业中", "出口"]),
        ('“half" and “all”, a "curly” one, \\"escaped\\"', ["half", "all", "curly", "escaped"]),
        ('a “He said "hi"” sign', ['He said "hi"']),
        ('a mug with "World\'s Best Dad"', ["World's Best Dad"]),
        ("a sign that says 'don't walk' near the boys' school, it's late", ["don't walk"]),
        ("rock 'n' roll, the dogs' bowl, isn't it", []),
        ('a 12" tall sign with "HI"', ["HI"]),
        ('an empty "" and a dotted "..." sign', []),
        ("no quotes", []),
    ],
)
def test_quoted_texts_are_found_and_apostrophes_and_inches_are_none(prompt, expected):
    assert quoted_texts(prompt) == expected


@pytest.mark.parametrize(
    "lines,score",
    [
        (["OPEN LATE"], 1),
        (["openlate"], 1),  # neither case nor white space counts
        (["Cafe", "we are open", "late", "tonight"], 1),  # other text costs nothing
        (["OPEM LATE"], 7 / 8),
        (["OPEN"], 4 / 8),
        (["OPEN every LATE"], 4 / 8),  # five letters too many are worse than "OPEN" alone
        (["completely different words"], 1 / 8),  # no better than its best run of words
        (["OPENLATEOPENLATE"], 0),  # as many letters too many as the text has
        ([], 0),
    ],
)
def test_a_text_scores_1_minus_its_edits_per_letter(lines, score):
    assert text_score("Open Late", lines) == pytest.approx(score)


def test_curly_and_long_marks_count_as_what_is_read_of_them():
    assert text_score("Don’t – “GO”", ['don\'t - "go"']) == 1


def test_drawn_words_are_found_and_damage_lowers_the_score(model):
    sign = words("OPEN\nLATE")
    pictures = [sign, words("open late"), words("OPEN LATE", 30, "red").convert("RGBA"), words("CLOSED")]
    pictures += [Image.new("L", (64, 64)), *(covered(words("OPEN LATE"), share) for share in (0.25, 0.5, 0.75))]
    prompts = [SIGN] * len(pictures)
    scores = model(pictures, prompts)
    np.testing.assert_array_equal(scores[:3], 1)
    assert scores[3] < 0.5 and scores[4] == 0
    assert 1 > scores[5] > scores[6] > scores[7] > 0
    backwards = OCRRewardModel(num_workers=3)(pictures[::-1], prompts)
    np.testing.assert_array_equal(backwards[::-1], scores)


def test_several_texts_count_alike_and_a_prompt_without_any_has_no_score(model):
    picture = words("PUSH")
    scores = model([picture] * 3, ['"PUSH" and "PULL"', "a door", "“push”"])
    assert 0.5 <= scores[0] < 1 and np.isnan(scores[1]) and scores[2] == 1


def test_a_failure_of_the_engine_is_no_score_and_torch_keeps_its_threads(monkeypatch, caplog):
    model, threads = OCRRewardModel(num_workers=1), torch.get_num_threads()
    assert model([words("OPEN LATE")], [SIGN]) == [1] and torch.get_num_threads() == threads

    def broken(pixels):
        raise RuntimeError("the engine stopped")

    monkeypatch.setattr(model, "engines", [broken])
    assert np.isnan(model([words("OPEN LATE")], [SIGN])).all() and "the engine stopped" in caplog.text


def test_without_the_package_one_line_names_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rapidfuzz" else found(name))
    with pytest.raises(ValueError, match=r"'shapes,ocr'.* needs the package rapidfuzz; `pip install -e '.\[ocr\]'`"):
        check_reward_files(config(reward_model="shapes,ocr"))


def test_an_engine_that_cannot_be_imported_is_one_line(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("rapidocr_onnxruntime")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cv2", None)  # an import of it fails
    with pytest.raises(ValueError, match="reward_model ocr: ModuleNotFoundError: .*cv2.*; OpenCV needs the system's"):
        check_reward_files(config(reward_model="ocr"))


def test_a_run_trains_on_what_is_read_and_an_evaluation_reports_it(train, tmp_path, monkeypatch, capfd):
    """The tiny model can't write, so its pictures are replaced by drawn ones."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{SIGN}\na red circle\n")
    drawn = [covered(words("OPEN LATE"), share) for share in (0, 0.25, 0.5, 1)]
    monkeypatch.setattr(train_grpo_flux, "decode_latents", lambda family, vae, latents, *_: drawn * (len(latents) // 4))
    run = train(reward_model="ocr:3,jpeg_compressibility", prompts_file=prompts, prompts_per_iteration=2)
    expected = np.mean(OCRRewardModel()(drawn, [SIGN] * 4))
    for line in run.metrics:
        assert line["reward_OCRRewardModel"] == pytest.approx(expected) and line["failed_OCRRewardModel"] == 4
        assert line["failed_JpegCompressibilityRewardModel"] == 0 and line["grad_norm"] > 0
    assert "1 of 2 prompts lack a text in quotation marks, such as 'a red circle'" in capfd.readouterr().err

    drawn[0].save(tmp_path / "sign.png")
    (tmp_path / "manifest.json").write_text(json.dumps([{"image": "sign.png", "prompt": SIGN}]))
    assert eval_reward.main(["--manifest", str(tmp_path / "manifest.json"), "--reward_model_type", "ocr"]) == 0
    assert json.loads((tmp_path / "manifest_scores.json").read_text())[0]["reward"] == {"OCRRewardModel": 1.0}


def test_prompts_of_which_none_has_a_text_are_refused_before_training(flags, refused, embedded_prompts, tmp_path):
    for given in ({}, {"eval_steps": 1, "eval_prompts": ROOT / "data/tiny_prompts.txt", "reward_model": "shapes"}):
        field = "eval_prompts" if given else "data_json_path"
        argv = flags(**{"reward_model": "ocr", **given, **({"eval_reward": "ocr"} if given else {})})
        with refused(f"--{field} .*: no prompt has a text in quotation marks, which the reward ocr needs"):
            train_grpo_flux.main(argv)
    assert not (tmp_path / "run").exists()


def test_the_prompt_files_have_texts_and_no_test_text_trains():
    files = [(ROOT / "data" / name).read_text(encoding="utf-8").splitlines() for name in PROMPT_FILES]
    assert [len(prompts) for prompts in files] == [60, 20]
    train, test = ([text for prompt in prompts for text in quoted_texts(prompt)] for prompts in files)
    assert all(map(quoted_texts, files[0] + files[1])) and not set(train) & set(test)


PROMPT_FILES = ("ocr_prompts.txt", "ocr_prompts_test.txt")
