"""Published benchmarks by one command, on small made prompt sets in each layout."""

import json
import subprocess
from pathlib import Path

from fastvideo.eval import run_benchmark
from fastvideo.eval.prompt_sets import COMPOSITIONS, DRAWBENCH, SETS
from fastvideo.models.reward_model.spec import RewardSpecConfig
from fastvideo.models.reward_model.utils import build_reward_models, check_reward_files
from fastvideo.models.reward_model.vlm_questions import can_score

import numpy as np
import pytest
from conftest import ROOT, torchrun
from PIL import Image

DPG = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
DPG += """question_natural_language
7,"A cat, red, on a mat.",,1,0,entity,whole,entity - whole (cat),Is there a cat?
7,"A cat, red, on a mat.",,2,1,attribute,color,"attribute - color (cat, red)",Is the cat red?
9,A dog and a hat.,,1,0,entity,whole,entity - whole (dog),Is there a dog?
9,A dog and a hat.,,2,"0",entity,whole,entity - whole (hat),Is there a hat?
9,A dog and a hat.,,3,"1,2",relation,spatial,"relation - spatial (hat, dog)",Is the hat on the dog?
"""
FILES = {
    "hpsv2": {f"benchmark/{style}.json": json.dumps([f"a {style} cat", "a dog"]) for style in ("anime", "photo")}
    | {f"benchmark/{style}.json": '["a hat"]' for style in ("concept-art", "paintings")},
    "partiprompts": {
        "PartiPrompts.tsv": "Prompt\tCategory\tChallenge\tNote\n"
        'a wall. The words "Fly" are on it. \tArts\tComplex\t\nthe moon\tOutdoor Scenes\tBasic\tEasy\n'
    },
    "drawbench": {DRAWBENCH: 'Prompts,Category\nA red colored car.,Colors\n"A cat, a dog.",Counting\n'},
    "geneval": {
        "evaluation_metadata.jsonl": '{"tag": "counting", "include": [{"class": "clock", "count": 2}], '
        '"exclude": [{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"}\n'
    },
    "dpg": {"dpg_bench.csv": DPG},
    "t2i_compbench": {f"{name}_val.txt": f"a {name} cat\n\na {name} dog\n" for name in COMPOSITIONS},
}
EXPECTED = {
    "hpsv2": [("a anime cat", "anime"), ("a dog", "anime"), ("a hat", "concept-art"), ("a hat", "paintings")],
    "partiprompts": [('a wall. The words "Fly" are on it.', "Arts"), ("the moon", "Outdoor Scenes")],
    "drawbench": [("A red colored car.", "Colors"), ("A cat, a dog.", "Counting")],
    "geneval": [("a photo of two clocks", "counting")],
    "dpg": [("A cat, red, on a mat.", None), ("A dog and a hat.", None)],
    "t2i_compbench": [("a color cat", "color"), ("a color dog", "color"), ("a shape cat", "shape")],
}


@pytest.fixture
def sets(tmp_path) -> Path:
    """data/benchmarks with small sets."""
    for name, files in FILES.items():
        folder = tmp_path / "benchmarks" / name
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
    return tmp_path / "benchmarks"


def flags(sets: Path, name: str, tiny_flux: str, **given: object) -> list[str]:
    small = {"benchmark": name, "benchmark_dir": sets, "pretrained_model_name_or_path": tiny_flux, "h": 32, "w": 32}
    small |= {"total_sampling_steps": 2, "max_sequence_length": 32, "output_dir": sets.parent / "out" / name}
    argv = ["--baseline"]
    for key, value in (small | given).items():
        argv += [f"--{key}", str(value)]
    return argv


@pytest.mark.parametrize("name", SETS)
def test_each_layout_is_read(name, sets):
    found = SETS[name].read(sets / name)
    assert [(entry["prompt"].strip(), entry.get("category")) for entry in found][: len(EXPECTED[name])] == EXPECTED[
        name
    ]
    if name == "geneval":
        assert found[0]["exclude"] == [{"class": "clock", "count": 3}] and found[0]["tag"] == "counting"
    if name == "dpg":
        assert [[q["parents"] for q in entry["questions"]] for entry in found] == [[[], [1]], [[], [], [1, 2]]]
        assert all(can_score("", entry) for entry in found)


@pytest.mark.parametrize("name", SETS)
def test_missing_and_damaged_files_are_one_line_that_says_what_fetches_them(name, sets, tiny_flux, refused):
    file = sets / name / SETS[name].files[0]
    for content in (b"\xff\xfe\x00", b"x\n"):
        file.write_bytes(content)
        if name == "t2i_compbench" and content == b"x\n":
            continue  # every line is a prompt
        with refused(rf"--benchmark {name}: .*not in the published layout \(.*\); `bash scripts/hugging\S* prompts"):
            run_benchmark.main(flags(sets, name, tiny_flux, reward_model_type="jpeg_compressibility"))
    file.unlink()
    with refused(
        f"--benchmark {name}: .*{file.name} is missing; `bash scripts/huggingface/download_checkpoints.sh prom"
    ):
        run_benchmark.main(flags(sets, name, tiny_flux, reward_model_type="jpeg_compressibility"))
    assert not (sets.parent / "out").exists()


def test_all_that_is_missing_is_said_at_once_and_before_anything_is_written(sets, tiny_flux, capsys):
    (sets / "drawbench" / SETS["drawbench"].files[0]).unlink()
    given = {
        "reward_model_type": "hpsv2,vlm_judge",
        "hps_path": sets / "none.pt",
        "model_path": sets / "checkpoint-9-0",
    }
    argv = [word for word in flags(sets, "drawbench", tiny_flux, **given) if word != "--baseline"]
    with pytest.raises(SystemExit):
        run_benchmark.main(argv)
    lines = capsys.readouterr().err.splitlines()
    found = [line.partition("error: ")[2].split()[0].rstrip(":") for line in lines if "error: " in line]
    assert found[:2] == ["--model_path", "--benchmark"] and {"--hps_path", "--vlm_judge_url"} < set(found)
    assert not (sets.parent / "out").exists()


def test_a_benchmark_samples_scores_and_compares_with_the_baseline(sets, tiny_flux, capsys, refused, monkeypatch):
    monkeypatch.setitem(SETS, "drawbench", SETS["drawbench"].__class__(**vars(SETS["drawbench"]) | {"count": 2}))
    given = {"reward_model_type": "jpeg_compressibility", "images_per_prompt": 2}
    assert run_benchmark.main(flags(sets, "drawbench", tiny_flux, **given)) == 0
    out, shown = sets.parent / "out/drawbench", capsys.readouterr().out
    entries = json.loads((out / "manifest.json").read_text())
    assert [entry["prompt"] for entry in entries] == ["A red colored car."] * 2 + ["A cat, a dog."] * 2
    assert "published: FLUX.1-dev, 50 steps: ImageReward 1.0412 (vipshop/cache-dit" in shown
    assert "Colors JpegCompressibilityRewardModel" in shown and "mean over 2 categories: " in shown
    found = json.loads((out / "benchmark.json").read_text())
    summary = json.loads((out / "manifest_scores_summary.json").read_text())
    styles = [part["models"]["JpegCompressibilityRewardModel"]["mean"] for part in summary["styles"].values()]
    assert found["mean_over_categories"]["JpegCompressibilityRewardModel"] == pytest.approx(np.mean(styles))
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}

    # Again: no picture is made again, and the manifest serves as its own baseline.
    baseline = {"baseline_manifest": out / "manifest.json", "trained_rewards": "jpeg_compressibility"}
    assert run_benchmark.main(flags(sets, "drawbench", tiny_flux, **given, **baseline)) == 0
    assert len(times) == 4 and times == {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    rows = json.loads((out / "manifest_scores_summary.json").read_text())["models"]
    assert rows["JpegCompressibilityRewardModel"]["difference_mean"] == 0

    # What can't work is refused before anything is sampled.
    elsewhere = given | {"output_dir": sets.parent / "elsewhere"}
    for more, message in (
        (
            {**elsewhere, **baseline, "benchmark": "partiprompts"},
            "--baseline_manifest: index 0 is 'A red colored car.'",
        ),
        (
            {**elsewhere, "reward_model_type": "hpsv2", "hps_path": "no/where.pt"},
            "--hps_path no/where.pt: no such file",
        ),
        ({**elsewhere, "reward_model_type": "vlm_judge"}, "--vlm_judge_url: not given; vlm_judge needs the URL"),
        ({**elsewhere, "prompts_file": "data/prompts.txt"}, "--prompts_file data/prompts.txt: a benchmark has its own"),
        ({"baseline": "geneval"}, "geneval is the value of no flag; did you mean --benchmark geneval"),
        ({**elsewhere, "benchmark": "coco"}, "--benchmark: invalid choice: 'coco'|argument --benchmark: invalid"),
    ):
        with refused(f"({message})"):
            run_benchmark.main(flags(sets, "drawbench", tiny_flux, **more))
    assert not (sets.parent / "elsewhere").exists()


def test_dpg_s_questions_are_asked_at_the_endpoint_and_a_baseline_has_the_same(
    sets, tiny_flux, chat_server, capsys, refused
):
    def answer(content):
        return 200, {"Yes": 0.1, "No": 0.8} if "a hat?" in content[1]["text"] else {"Yes": 0.8, "No": 0.1}

    server = chat_server(answer)
    given = {"vlm_judge_url": server.url, "images_per_prompt": 1}
    assert run_benchmark.main(flags(sets, "dpg", tiny_flux, **given)) == 0
    scores = json.loads((sets.parent / "out/dpg/manifest_scores.json").read_text())
    # Without a hat, the hat isn't on the dog either, whatever the judge says.
    assert [entry["reward"]["VLMQuestionsModel"] for entry in scores] == [1, pytest.approx(1 / 3)]
    assert len(server.requests) == 1 + 5
    assert "2 of 1065 prompts: not comparable with published numbers" in capsys.readouterr().out

    given["baseline_manifest"] = sets.parent / "out/dpg/manifest.json"
    assert run_benchmark.main(flags(sets, "dpg", tiny_flux, **given)) == 0
    (sets / "dpg/dpg_bench.csv").write_text(DPG.replace("Is there a hat?", "Is there a cap?"))
    given["output_dir"] = sets.parent / "out/other"
    with refused("--baseline_manifest: index 1, 'A dog and a hat.', has other metadata there"):
        run_benchmark.main(flags(sets, "dpg", tiny_flux, **given))


def test_geneval_s_verdicts_are_reported_per_category(sets, tiny_flux, narrow_geneval):
    given = {**narrow_geneval, "images_per_prompt": 1}
    assert run_benchmark.main(flags(sets, "geneval", tiny_flux, **given)) == 0
    found = json.loads((sets.parent / "out/geneval/benchmark.json").read_text())
    assert found["mean_over_categories"].keys() >= {"GenEvalRewardModel", "GenEvalRewardModel_right"}
    assert "GenEvalRewardModel_right" in found["note"] and found["prompts"] < found["published_prompts"]


def test_questions_without_an_answer_and_prompts_without_questions_give_no_score(chat_server):
    def answer(content):
        return (200, "no logprobs") if "colour" in content[1]["text"] else (200, {"yes": 0.9, "no": 0.1})

    config = RewardSpecConfig(reward_model="vlm_questions", vlm_judge_url=chat_server(answer).url)
    model = build_reward_models(config, "cpu")[0]["VLMQuestionsModel"]
    metadata = [
        {"questions": ["Is it a cat?", {"question": "Is it big?", "parents": [1]}]},
        {"questions": ["Is it a cat?", "Which colour?"]},
        {"questions": [{"text": "Is it?"}]},
        {},
    ]
    scores = model([Image.new("RGB", (8, 8))] * 4, ["x"] * 4, metadata)
    np.testing.assert_array_equal(scores, [1, np.nan, np.nan, np.nan])
    with pytest.raises(ValueError, match="vlm_judge_url: not given; vlm_questions needs"):
        check_reward_files(RewardSpecConfig(reward_model="vlm_questions"))


def test_the_script_takes_the_benchmark_s_name_first(subprocess_environment):
    environment = {**subprocess_environment, "PYTHON_BIN": "echo", "MODEL_PATH": "outputs/x"}
    command = ["bash", "scripts/evaluate/benchmark.sh", "dpg", "--baseline"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    given = "--model_path outputs/x --override --benchmark dpg --baseline"
    assert done.stdout.split() == ["-m", "fastvideo.eval.run_benchmark", *given.split()]


def test_results_have_a_folder_per_model():
    def folder(**given: object) -> str:
        return run_benchmark.BenchmarkConfig(benchmark="drawbench", **given).output_dir

    assert folder(baseline=True) == "outputs/benchmarks/drawbench/base"
    path = "outputs/mixgrpo/checkpoint-300-0"
    assert folder(model_path=path) == "outputs/benchmarks/drawbench/mixgrpo_checkpoint-300-0"


@pytest.mark.slow
def test_several_processes_share_a_benchmark(sets, tiny_flux, subprocess_environment):
    given = flags(sets, "partiprompts", tiny_flux, reward_model_type="jpeg_compressibility")
    done = torchrun(given, subprocess_environment, "fastvideo/eval/run_benchmark.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 of 1632 prompts: not comparable") == 1
    assert len(list((sets.parent / "out/partiprompts").glob("*.png"))) == 2
