"""The report of a run: readable numbers, no external files, no code from prompts executed; checked in a browser."""

import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

from fastvideo.eval import report
from fastvideo.eval.live import LiveReport
from fastvideo.eval.plots import WRONG, column, compare_plots, draw, draw_schedules, plan_plots, smoothed
from fastvideo.eval.report_page import remarks
from fastvideo.eval.runs import Run, group_runs
from fastvideo.io.metrics import read_metrics
from fastvideo.io.scores import ScoreName, reward_schema, score_names

import custom_rewards
import numpy as np
import pytest
from browser import Browser, browser_command
from conftest import TIME_LIMIT
from matplotlib.colors import to_rgb
from PIL import Image

EVIL = "<script>document.title = 'attacked'</script> & \"quotes\" 'too' <img src=https://example.invalid/x.png> 🐟"
EVIL += "/" + "m" * 1900
MODEL, PARTS = "ShapesRewardModel", ("binding", "form", "clean")
GAINS = [0.1, -0.3, 0.5, 0.0, None, 0.2]  # by index; None: a failed score


def metrics_row(step: int) -> dict:
    weights = {f"granular_weight_{c}": w for c, w in zip(PARTS, (0.5, 0.3, 0.2), strict=True)}
    parts = {f"reward_{MODEL}_{c}": 0.5 + step / 100 for c in (*PARTS, "right")}
    phases = {f"seconds_{p}": 1.0 for p in ("rollout", "decode", "reward", "train")}
    row = {"step": step, "images": 24, "lr": 1e-4, "loss": 0.001, "ratio_max_deviation": 2e-4, "clip_frac": 0.3}
    row |= {"grad_norm": 0.4, "reward": 0.5 + step / 100, "reward_std": 0.1, f"reward_{MODEL}": 0.5 + step / 100}
    return row | parts | weights | phases | {"window": [step // 10, step // 10 + 1], "seconds_total": 4.0}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 30 iterations, sample grids, and scores of 6 pairs."""
    out = tmp_path / "run"
    (out / "images").mkdir(parents=True)
    settings = {"experiment_name": "a <b>run</b>", "max_train_steps": 40, "clip_range": 1e-4, "sampling_steps": 10}
    settings |= {"some_api_key": "sesame", "image_reward_http_proxy": "http://joe:sesame@proxy:80"}
    (out / "args.json").write_text(json.dumps(settings))
    (out / "metrics.jsonl").write_text("".join(json.dumps(metrics_row(i)) + "\n" for i in range(1, 31)))
    Image.new("RGB", (300, 200), "navy").save(out / "images" / "iteration_000010.png")
    for side in ("base", "tuned"):
        entries = []
        for i, gain in enumerate(GAINS):
            Image.new("RGB", (8, 8), "red" if side == "base" else "green").save(out / f"{side}_{i}.png")
            score = 0.4 if side == "base" else None if gain is None else 0.4 + gain
            prompt = EVIL if i == 1 else f"a large circle {i // 2}"
            entries.append({"index": i, "image": f"{side}_{i}.png", "prompt": prompt, "reward": {MODEL: score}})
        (out / f"{side}.json").write_text(json.dumps(entries))
    return out


@pytest.fixture
def other_run(run_dir: Path) -> Path:
    """A run like run_dir with another learning rate, half as long, and with two evaluations."""
    out = run_dir.with_name("other <i>run, 2")
    shutil.copytree(run_dir, out)
    own = {"learning_rate": 1e-3, "experiment_name": "<i>other</i>", "reward_model": "shapes", "eval_reward": None}
    (out / "args.json").write_text(json.dumps(json.loads((out / "args.json").read_text()) | own))
    rows = [{"step": 0} | evaluation_row(0)] + [metrics_row(i) for i in range(1, 16)]
    rows[-1] |= evaluation_row(15)
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for side, step in (("base", 0), ("tuned", 15)):
        folder = out / "evaluation" / f"{step:06d}"
        folder.mkdir(parents=True)
        for path in out.glob(f"{side}*.*"):
            shutil.copy(path, folder / path.name.replace(f"{side}.json", "scores.json"))
    return out


def evaluation_row(step: int) -> dict:
    score = 0.3 + step / 100
    return {"evaluation_reward": score, f"evaluation_reward_{MODEL}": score, "evaluation_best_iteration": step or None}


def write(run_dir: Path) -> str:
    page, _ = report.write_report(run_dir, run_dir / "base.json", run_dir / "tuned.json")
    return page.read_text(encoding="utf-8")


class Attributes(HTMLParser):
    """All attributes of a page: [(name, value)]."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(name, value or "") for name, value in attrs]


def test_page_refers_to_nothing_outside_and_shows_no_secret(run_dir: Path):
    page = write(run_dir)
    assert EVIL not in page and html.escape(EVIL) in page
    assert "<b>run</b>" not in page and "sesame" not in page
    found = Attributes(page).found
    references = [v for k, v in found if k in ("src", "srcset", "href", "xlink:href", "action", "data", "poster")]
    references += [url for k, v in found if k in ("style", "clip-path") for url in re.findall(r"url\((.*?)\)", v)]
    assert references and all(r.startswith(("data:image/", "#")) for r in references)
    assert "@import" not in page and page.count("<script") == 1
    ids = [v for k, v in found if k == "id"]
    assert len(ids) == len(set(ids))
    for plot in ("reward", "components", "granular_weights", "ratio", "optimisation", "window", "seconds"):
        with Image.open(run_dir / "report" / f"{plot}.png") as image:
            assert image.width > 600


def test_headline_numbers_are_paired_and_clustered_by_prompt(run_dir: Path, capsys: pytest.CaptureFixture):
    path = report.main(
        [
            "--run_dir",
            str(run_dir),
            "--baseline_scores",
            f"{run_dir}/base.json",
            "--tuned_scores",
            f"{run_dir}/tuned.json",
        ]
    )
    changes = np.array([g for g in GAINS if g is not None])
    prompts = ["0", "evil", "1", "1", "2"]
    residuals = changes - changes.mean()
    sums = [residuals[[p == q for q in prompts]].sum() for p in dict.fromkeys(prompts)]
    error = np.sqrt(np.square(sums).sum() * 4 / 3) / 5
    assert f"+{changes.mean():.2f} ± {error:.2f}  (5 pairs)" in capsys.readouterr().out
    page = path.read_text(encoding="utf-8")
    assert "Pairs left out of ShapesRewardModel because a score failed: 1." in page
    assert "of 40 planned" in page and "70%" in page  # 3 of 5, and a tie


def with_check(run_dir: Path) -> list[str]:
    """Flags for score files with a check, in eval_reward's format: 2 of 5 pictures right before training, 4 after."""
    for side, right in (("base", "101000"), ("tuned", "111010")):
        entries = json.loads((run_dir / f"{side}.json").read_text())
        for entry, yes in zip(entries, right, strict=True):
            failed = entry["index"] == 4
            entry["reward"][f"{MODEL}_right"] = None if failed else int(yes)
        (run_dir / f"{side}.json").write_text(json.dumps(entries))
    scores = [f"--{flag}_scores={run_dir}/{side}.json" for flag, side in (("baseline", "base"), ("tuned", "tuned"))]
    return ["--run_dir", str(run_dir), *scores]


def test_right_in_everything_leads(run_dir: Path, capsys: pytest.CaptureFixture):
    argv = with_check(run_dir)
    path = report.main(argv)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"right in everything  before 0\.40  after 0\.60  \(5 pictures, ± 0\.\d\d and ± 0\.\d\d\)", first
    )
    assert second.startswith(f"{MODEL}  before ") and second.endswith("(5 pairs)")
    page = path.read_text(encoding="utf-8")
    tiles = re.findall(r"<dt>(.*?)</dt><dd><b>(.*?)</b>", page)
    assert tiles[:2] == [("right in everything", "0.40 → 0.60"), ("Fixed prompts", "0.400 → 0.500")]
    rows = re.findall(r'<th scope="row">(.*?)</th><td data-label="Before">(.*?)</td>', page)
    assert [name for name, _ in rows] == ["right in everything", MODEL] and rows[0][1].startswith("0.40 ± 0.")
    assert re.findall(r'<li data-index="(\d)"', page)[:3] == ["2", "5", "0"]  # ranked by the reward model's score
    assert re.findall(r'<option value="(\w*)">(.*?)</option>', page)[:2] == [
        (MODEL, MODEL), (f"{MODEL}_right", "right in everything"),
    ]  # fmt: skip
    assert re.findall("<h3>(.*?)</h3>", page)[:2] == ["Right in everything", "Reward"]


def test_right_in_everything_is_a_curve_of_training_and_of_evaluation(other_run: Path):
    rows = Run.read(other_run).rows
    rows[0] |= {f"evaluation_reward_{MODEL}_right": 0.25}  # before training
    rows[-1] |= {f"evaluation_reward_{MODEL}_right": 0.75}
    first, *others = plan_plots(rows, {})
    assert (first.name, [panel.title for panel in first.panels]) == ("right", ["training pictures", "evaluation"])
    training, evaluation = (next(iter(panel.series.values())) for panel in first.panels)
    assert list(first.steps) == list(range(16))
    assert np.array_equal(training, [np.nan, *(0.5 + i / 100 for i in range(1, 16))], equal_nan=True)
    assert (evaluation[0], evaluation[-1], np.isfinite(evaluation).sum()) == (0.25, 0.75, 2)
    assert not any("right" in panel.title for plot in others for panel in plot.panels)
    without = [{k: v for k, v in row.items() if not k.endswith("_right")} for row in rows]
    assert plan_plots(without, {})[0].name == "evaluation"


def test_a_summary_for_other_programs_says_null_where_nothing_is_known(run_dir: Path, tmp_path: Path):
    argv = with_check(run_dir)
    summary = json.loads(report.main(argv).with_name("summary.json").read_text())
    assert (summary["right_before"], summary["right_after"], summary["pictures"]) == (0.4, 0.6, 5)
    assert 0 < summary["right_after_error"] < 0.4 and 0 < summary["right_before_error"] < 0.4
    assert (summary["iterations"], summary["seconds_of_training"]) == (30, 120.0)
    assert [(row["model"], row["n"], row["failed"]) for row in summary["scores"]] == [
        (f"{MODEL}_right", 5, 1), (MODEL, 5, 1),
    ]  # fmt: skip
    assert summary["scores"][1]["before"][0] == pytest.approx(0.4)

    for side in ("base", "tuned"):  # a single prompt: errors aren't known
        path = run_dir / f"{side}.json"
        path.write_text(json.dumps(json.loads(path.read_text())[2:3]))
    single = json.loads(report.main(argv).with_name("summary.json").read_text())
    assert (single["right_before"], single["right_before_error"]) == (1, None)

    path, _ = report.write_report(run_dir, output_dir=tmp_path / "no scores")
    nothing = json.loads(path.with_name("summary.json").read_text())
    assert nothing.keys() == summary.keys() and nothing["scores"] == [] and nothing["iterations"] == 30
    known = ("scores", "iterations", "seconds_of_training")
    assert {value for name, value in nothing.items() if name not in known} == {None}


def test_signs_of_the_evaluation_are_on_the_page_and_printed_after_the_scores(
    run_dir: Path, capsys: pytest.CaptureFixture
):
    argv = with_check(run_dir)
    report.main(argv)
    assert "against the baseline" not in capsys.readouterr().out  # without a summary
    (run_dir / "tuned_summary.json").write_text(json.dumps({"signs": ["saturation changed: <+0.3>"]}))
    page = report.main(argv).read_text(encoding="utf-8")
    *_, table, sign, path = capsys.readouterr().out.splitlines()
    assert table.startswith(MODEL) and sign == "against the baseline, saturation changed: <+0.3>"
    assert "<li>Against the baseline, saturation changed: &lt;+0.3&gt;.</li>" in page
    for unknown in ("[]", "{", '{"signs": null}'):
        (run_dir / "tuned_summary.json").write_text(unknown)
        assert "Against the baseline" not in report.main(argv).read_text(encoding="utf-8")


def test_what_training_pictures_look_like_is_a_group_of_panels(run_dir: Path):
    looks = ("saturation", "sharpness", "high_frequency", "diversity")
    rows = [metrics_row(i) | {f"hacking_{name}": i / 10 for name in looks} for i in range(1, 31)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<h3>Signs of reward hacking</h3>" in write(run_dir) and (run_dir / "report/hacking.png").exists()
    plot = next(plot for plot in plan_plots(rows, {}) if plot.name == "hacking")
    assert [panel.title for panel in plot.panels] == ["saturation", "sharpness", "high frequency", "diversity"]
    assert all(panel.series[key][29] == 3 for panel in plot.panels for key in panel.series)


@pytest.mark.parametrize("moved", [True, False])
def test_a_training_reward_whose_weights_moved_is_called_not_comparable(run_dir: Path, moved: bool):
    rows = [{"step": 0, "evaluation_reward": 1.0}, *(metrics_row(i) for i in range(1, 5))]
    rows[-1] |= {"granular_weight_binding": 0.4, "granular_weight_form": 0.4} if moved else {}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write(run_dir)
    assert ("not comparable, as weights moved" in page) == moved
    assert ("can&#x27;t be compared with that of another" in page) == moved


def hacked_rows(count: int) -> list[dict]:
    """Metrics whose looks all change evenly from the first tenth of the run to the last."""
    way = np.linspace(0, 1, count // 10 * 8 + count % 10)
    way = np.concatenate([np.zeros(count // 10), way, np.ones(count // 10)])
    moved = {"sharpness": -0.71, "high_frequency": 0.4, "saturation": -0.2, "diversity": -0.9}
    return [
        metrics_row(i) | {f"hacking_{name}": 0.5 * (1 + change * share) for name, change in moved.items()}
        for i, share in enumerate(way, 1)
    ]


@pytest.mark.parametrize("count", [40, 19])
def test_training_pictures_that_look_different_at_the_end_are_a_remark(run_dir: Path, count: int):
    """Only if a tenth of the run has 2 iterations or more, because pictures of other prompts look different too."""
    rows = [{"step": 0, "evaluation_reward": 1.0}, *hacked_rows(count)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [
        "Sharpness of the training pictures fell by 71 %: look at the samples, this can be reward hacking.",
        "High frequency of the training pictures rose by 40 %: look at the samples, this can be reward hacking.",
    ]
    assert remarks(Run.read(run_dir)) == expected * (count == 40)
    assert (f"<li>{expected[0]}</li>" in write(run_dir)) == (count == 40)


def test_running_training_with_half_a_line_repeated_steps_and_missing_keys(tmp_path: Path):
    lines = [
        {"step": 1, "reward": 0.1},
        {"step": 2, "reward": None, "skipped_steps": float("inf"), "something_new": {"a": 1}},
        {"step": 1, "reward": 0.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "rew'
    (tmp_path / "metrics.jsonl").write_text(text)
    rows, broken = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["reward"] == 0.5 and broken == 1
    page, compared = report.write_report(tmp_path, output_dir=tmp_path / "elsewhere")
    assert compared.rows == [] and "Unfinished lines of metrics.jsonl left out: 1." in page.read_text()
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "reward.png", "summary.json"]


def test_a_run_with_evaluations_shows_the_first_beside_the_last(other_run: Path):
    path, compared = report.write_report(other_run)
    page = path.read_text(encoding="utf-8")
    assert (
        compared.rows[0]["n"] == 5
        and "Iteration 0: a large circle 0" in page
        and "Iteration 15: a large circle 0" in page
    )
    assert "<dt>Best evaluation</dt><dd><b>0.450</b><span>iteration 15, shapes</span>" in page
    assert EVIL not in page and html.escape(EVIL) in page
    with Image.open(other_run / "report" / "evaluation.png") as image:
        assert image.width > 600


def test_a_run_resumed_with_other_evaluation_prompts_has_a_report_that_says_so(other_run: Path):
    path = other_run / "evaluation/000015/scores.json"
    path.write_text(path.read_text().replace("circle 0", "square 0"))
    page, compared = report.write_report(other_run)
    assert compared.rows == [] and "<dt>Best evaluation</dt>" in page.read_text()
    assert re.search(r"No pictures are compared: .*index 0 has another prompt", page.read_text())


def test_a_comparison_has_a_line_per_setting_and_a_band_over_seeds(run_dir: Path, other_run: Path, tmp_path: Path):
    """Two seeds, with rewards 0.51 to 0.80 and 0.2 higher, make one line."""
    seed = run_dir.with_name("seed")
    shutil.copytree(run_dir, seed)
    settings = json.loads((seed / "args.json").read_text())
    (seed / "args.json").write_text(json.dumps(settings | {"seed": 5, "output_dir": "elsewhere"}))
    rows = [metrics_row(i) | {"reward": metrics_row(i)["reward"] + 0.2} for i in range(1, 31)]
    (seed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    path = report.main(["--run_dir", str(run_dir), str(seed), str(other_run), "--output_dir", str(tmp_path / "out")])
    page = path.read_text(encoding="utf-8")
    cells = re.findall(r'<td data-label="(.*?)">(.*?)</td>', page)
    assert [v for k, v in cells if k == "Seeds"] == ["2", "1"]
    assert [v for k, v in cells if k == "Reward at first"] == ["0.62 ± 0.14", "0.510"]  # (0.52 + 0.72) / 2
    assert [v for k, v in cells if k == "Evaluation at last"] == ["–", "0.450"]
    assert [v for k, v in cells if k == "Evaluated by"] == ["–", "shapes"]
    assert re.search(r'<th scope="row">learning_rate</th><td[^>]*>–</td><td[^>]*>0.001</td>', page)
    assert "<b>run</b>" not in page and "<i>other</i>" not in page and "sesame" not in page

    groups = group_runs([Run.read(path) for path in (run_dir, seed, other_run)])
    plots = {name: [plan_plots(run.rows, run.settings) for run in runs] for name, runs in groups.items()}
    reward = next(plot for plot in compare_plots(plots) if plot.name == "reward")
    name, other = groups
    assert np.allclose(reward.panels[0].series[name], np.arange(1, 31) / 100 + 0.6)
    assert np.allclose(reward.panels[0].spread[name], 0.2 / np.sqrt(2))
    assert np.isfinite(reward.panels[0].series[other]).sum() == 15 and other not in reward.panels[0].spread
    names = "right reward components granular_weights ratio optimisation window seconds evaluation".split()
    names += ["evaluation_by_pictures", "evaluation_by_seconds"]
    assert sorted(p.stem for p in path.parent.glob("*.png")) == sorted(names)


def test_compared_runs_are_also_shown_at_equal_cost_and_no_line_goes_on_after_its_run(other_run: Path):
    """The second run samples three times the pictures per iteration in half the time, and ends after 15 iterations."""
    settings = json.loads((other_run / "args.json").read_text())
    rows = [metrics_row(i) for i in range(1, 31)]
    short = [row | {"images": 72, "seconds_total": 2.0} for row in rows[:15]]
    plots = compare_plots({"long": [plan_plots(rows, settings)], "short": [plan_plots(short, settings)]})
    by_name = {plot.name: plot for plot in plots}
    for name, axis, costs in (
        ("reward_by_pictures", "pictures sampled", {"long": 24, "short": 72}),
        ("reward_by_seconds", "seconds of training, without evaluations", {"long": 4, "short": 2}),
    ):
        (panel,) = by_name[name].panels
        assert by_name[name].axis == axis and panel.title == "weighted total"
        for run, iterations in (("long", 30), ("short", 15)):
            assert np.allclose(panel.along[run][:iterations], costs[run] * np.arange(1, iterations + 1))
        assert np.isfinite(panel.along["short"]).sum() == 15
    assert np.isfinite(smoothed(by_name["reward"].panels[0].series["short"])).sum() == 15
    figure = draw(by_name["reward_by_pictures"])
    assert figure.axes[0].get_xlim() == (0, pytest.approx(72 * 15 * 1.02))


def test_numbers_that_hardly_differ_have_an_axis_of_plain_numbers():
    rows = [metrics_row(i) | {"reward": 0.9977 + i * 1e-6, "reward_std": 1e-7} for i in range(1, 31)]
    figure = draw(next(plot for plot in plan_plots(rows, {}) if plot.name == "reward"))
    figure.canvas.draw()
    assert figure.axes[0].yaxis.get_offset_text().get_text() == ""
    assert all(label.get_text().startswith(("0.9976", "0.9977")) for label in figure.axes[0].get_yticklabels())


def test_a_best_evaluation_of_several_rewards_says_that_it_is_a_sum(other_run: Path):
    settings = json.loads((other_run / "args.json").read_text()) | {"eval_reward": "hpsv2,pick_score:0.5"}
    (other_run / "args.json").write_text(json.dumps(settings))
    page = report.write_report(other_run)[0].read_text()
    assert "<span>iteration 15, weighted sum of raw scores: hpsv2,pick_score:0.5</span>" in page


def test_sample_grids_have_the_prompt_that_their_file_names(train):
    run = train(image_log_steps=1, max_train_steps=1)
    page = report.write_report(run.folder)[0].read_text()
    assert re.search(r"<figcaption>iteration 1: (\w+ )+background</figcaption>", page)


def test_runs_evaluated_by_different_rewards_share_no_axis(other_run: Path):
    settings = json.loads((other_run / "args.json").read_text())
    rows = Run.read(other_run).rows
    plots = {measure: [plan_plots(rows, settings | {"eval_reward": measure})] for measure in ("hpsv2", "pick_score")}
    (evaluation,) = (plot for plot in compare_plots(plots) if plot.name == "evaluation")
    deciding = {panel.title: list(panel.series) for panel in evaluation.panels if "decides" in panel.title}
    title = "what decides the best checkpoint: "
    assert deciding == {f"{title}hpsv2": ["hpsv2"], f"{title}pick_score": ["pick_score"]}


@pytest.mark.parametrize("lines", [0, 1])
def test_report_of_a_run_that_has_hardly_begun(tmp_path: Path, lines: int):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(metrics_row(i + 1)) + "\n" for i in range(lines)))
    page, _ = report.write_report(tmp_path)
    assert ("no finished iteration yet" in page.read_text()) == (lines == 0)


def test_missing_and_broken_pictures_leave_a_note(run_dir: Path):
    (run_dir / "base_0.png").unlink()
    (run_dir / "tuned_2.png").write_bytes(b"no picture")
    bomb = bytearray((run_dir / "tuned_3.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 50000, 50000)  # the size, in a PNG's first chunk
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (run_dir / "tuned_3.png").write_bytes(bomb)
    entries = json.loads((run_dir / "tuned.json").read_text())
    entries[4]["image"] = "zero\0byte"
    (run_dir / "tuned.json").write_text(json.dumps(entries))
    assert write(run_dir).count('class="missing"') == 4


def test_a_model_that_one_side_never_scored_has_not_failed(run_dir: Path):
    entries = json.loads((run_dir / "tuned.json").read_text())
    for entry in entries:
        entry["reward"]["OnlyHere"] = 1.0
    (run_dir / "tuned.json").write_text(json.dumps(entries))
    page, compared = report.write_report(run_dir, run_dir / "base.json", run_dir / "tuned.json")
    assert "OnlyHere" not in page.read_text() and "OnlyHere" not in [row["model"] for row in compared.rows]


def test_gallery_of_many_pairs_spans_best_to_worst(run_dir: Path):
    page, _ = report.write_report(run_dir, run_dir / "base.json", run_dir / "tuned.json", max_gallery=3)
    assert re.findall(r'<li data-index="(\d)"', page.read_text()) == ["2", "0", "4"]  # 4 has no score: last


def colour(index: int, side: int) -> tuple[int, int, int]:
    return 8 * index, 40 + 90 * side, 200


@pytest.fixture
def many_pairs(run_dir: Path) -> tuple[Path, Path]:
    """Scores of 14 prompts with 2 pictures each. Pictures have different sizes and one colour each. Prompts are not in
    alphabetical order, entries not in the order of their index. Pictures of every third prompt are wrong; before
    training, pictures of prompts 1 and 2 are wrong too.
    """
    paths = []
    for side in (0, 1):
        entries = []
        for index in range(28):
            number = index // 2
            size = ((32, 32), (700, 700), (300, 150))[number % 3]
            Image.new("RGB", size, colour(index, side)).save(run_dir / f"{side}_{index}.png")
            right = number % 3 > 0 and (side == 1 or number not in (1, 2, 3))
            scores = {MODEL: 0.1 * index * side, f"{MODEL}_right": float(right)}
            prompt = f"{'zyxwvutsrqponm'[number]} circle {number}"
            entries.append({"index": index, "image": f"{side}_{index}.png", "prompt": prompt, "reward": scores})
        paths.append(run_dir / f"scores_{side}.json")
        paths[side].write_text(json.dumps(entries[::-1]))
    return paths[0], paths[1]


def drawn(run_dir: Path, scores: tuple[Path, Path]) -> np.ndarray:
    """The pixels of before_after.png."""
    page, _ = report.write_report(run_dir, *scores)
    with Image.open(page.with_name("before_after.png")) as image:
        return np.asarray(image.convert("RGB"))


def box(pixels: np.ndarray, of: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """Top, bottom, left and right edge of the area with a colour."""
    down, across = np.nonzero((pixels == of).all(2))
    return (down.min(), down.max() + 1, across.min(), across.max() + 1) if len(down) else None


def test_the_first_picture_of_each_of_the_first_prompts_is_drawn_in_their_order(run_dir: Path, many_pairs):
    pixels = drawn(run_dir, many_pairs)
    assert 1100 < pixels.shape[1] < 1400 and 900 < pixels.shape[0] < 1200
    boxes = {(i, side): box(pixels, colour(i, side)) for i in range(28) for side in (0, 1)}
    assert {key for key, found in boxes.items() if found} == {(i, side) for i in range(0, 24, 2) for side in (0, 1)}
    corners = [[boxes[i, side][::2] for i in range(0, 24, 2)] for side in (0, 1)]
    for (top, left), (below, under) in zip(*corners, strict=True):
        assert 150 < below - top < 300 and under == left
    for row in (corners[0][:6], corners[0][6:]):
        assert np.ptp([top for top, _ in row]) < 60 and (np.diff([left for _, left in row]) > 150).all()
    assert corners[0][6][0] > corners[1][0][0] + 150
    top, bottom, left, right = boxes[4, 1]  # of 300 × 150
    assert (right - left) / (bottom - top) == pytest.approx(2, abs=0.05) and right - left > 180


def test_only_wrong_pictures_are_marked_by_a_frame_and_by_a_cross(run_dir: Path, many_pairs):
    pixels = drawn(run_dir, many_pairs)
    red = (pixels == [round(255 * part) for part in to_rgb(WRONG)]).all(2)
    white = (pixels == 255).all(2)
    wrong = {(number, side) for number in range(12) for side in (0, 1) if number % 3 == 0 or (number < 4 and not side)}
    for number in range(12):
        for side in (0, 1):
            top, bottom, left, right = box(pixels, colour(2 * number, side))
            marked = (number, side) in wrong
            frame = [red[top - 3, left:right], red[bottom + 2, left:right], red[top:bottom, left - 3]]
            assert [round(line.mean(), 1) for line in frame] in ([[0.9, 1, 1]] if marked else [[0, 0, 0]]), (
                number,
                side,
            )
            assert (white[top:bottom, left:right].sum() > 50) == marked  # the cross
    first = min(box(pixels, colour(0, 0))[0], box(pixels, colour(2, 0))[0])
    assert red[: first - 10].any()  # the legend
    for path in many_pairs:
        path.write_text(path.read_text().replace(f"{MODEL}_right", f"{MODEL}_form"))
    assert not (drawn(run_dir, many_pairs) == [round(255 * part) for part in to_rgb(WRONG)]).all(2).any()


def test_a_picture_that_cannot_be_read_or_has_no_answer_leaves_its_place_unmarked(run_dir: Path, many_pairs):
    (run_dir / "1_0.png").unlink()
    (run_dir / "1_2.png").write_bytes(b"no picture")
    entries = json.loads(many_pairs[0].read_text())
    for entry in entries:
        entry["prompt"] = EVIL + "\ud800\0 $x$" if entry["index"] < 2 else entry["prompt"]
        entry["reward"][f"{MODEL}_right"] = None
    many_pairs[0].write_text(json.dumps(entries))
    tuned = json.loads(many_pairs[1].read_text())
    for entry, other in zip(tuned, entries, strict=True):
        entry["prompt"], entry["reward"][f"{MODEL}_right"] = other["prompt"], float(entry["index"] > 0)
    many_pairs[1].write_text(json.dumps(tuned))
    pixels = drawn(run_dir, many_pairs)
    assert [box(pixels, colour(index, 1)) is None for index in (0, 2, 4)] == [True, True, False]
    top = box(pixels, colour(0, 0))[0]
    assert not (pixels[top - 5 :] == [round(255 * part) for part in to_rgb(WRONG)]).all(2).any()


def test_bad_input_is_one_clear_line(run_dir: Path):
    with pytest.raises(ValueError, match="^run_dir .* no metrics.jsonl"):
        report.write_report(run_dir / "images")
    (run_dir / "metrics.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="^baseline_scores .* not a scores file"):
        report.write_report(run_dir, run_dir / "metrics.json", run_dir / "tuned.json")
    (run_dir / "tuned.json").write_text((run_dir / "base.json").read_text().replace("circle 0", "square 0"))
    with pytest.raises(ValueError, match="index 0 has another prompt"):
        report.write_report(run_dir, run_dir / "base.json", run_dir / "tuned.json")


def test_smoothing_keeps_lines_and_leaves_out_gaps():
    values = np.arange(100.0)
    values[50] = np.nan
    assert np.allclose(smoothed(values)[10:40], values[10:40]) and np.isfinite(smoothed(values)).all()


def test_every_reward_and_component_gets_a_panel():
    row = metrics_row(1) | {"reward_HPSClipRewardModel": 0.3}
    components = next(p for p in plan_plots([row], {}) if p.name == "components")
    assert [panel.title for panel in components.panels] == [
        MODEL, f"binding ({MODEL})", f"form ({MODEL})", f"clean ({MODEL})", "HPSClipRewardModel"
    ]  # fmt: skip
    assert np.isnan(column([{"a": "text"}, {"a": None}, {}], "a")).all()


def test_a_reward_whose_name_begins_with_another_ones_keeps_its_own_panel(train, monkeypatch):
    """args.json says which scores are rewards, components and checks. The names alone don't say it."""
    for name in ("bright", "bright_smooth", "all_right"):
        monkeypatch.setattr(custom_rewards, name, custom_rewards.rough_brightness, raising=False)
    names = ["bright", "bright_smooth", "all_right"]
    run = train(reward_model=",".join([*(f"custom_rewards:{name}" for name in names), "shapes:3"]))
    found = Run.read(run.folder)
    assert found.reward_names == {name: {"components": [], "checks": [], "weight": 1 / 6} for name in names} | {
        MODEL: {"components": list(PARTS), "checks": ["right"], "weight": 0.5}
    }
    assert "reward_names" not in found.settings
    plots = {plot.name: plot.panels for plot in plan_plots(found.rows, found.settings, found.reward_names)}
    titles = [*names, MODEL, *(f"{part} ({MODEL})" for part in PARTS)]
    assert [panel.title for panel in plots["components"]] == titles
    assert list(plots["right"][0].series) == [f"reward_{MODEL}_right"]
    assert "bright_smooth" in report.write_report(run.folder)[0].read_text()


def test_scores_that_no_schema_names_are_guessed_from_each_other():
    class Model:
        component_names, check_names = ("part",), ("fine",)

    schema = reward_schema({"A": Model(), "A_b": object()}, {"A": 1.0})
    assert schema == {
        "A": {"components": ["part"], "checks": ["fine"], "weight": 1.0},
        "A_b": {"components": [], "checks": [], "weight": 0.0},
    }
    known = {"A_b": ScoreName("A_b", "", "reward"), "A_part": ScoreName("A", "part", "component")}
    known["A_fine"] = ScoreName("A", "fine", "check")
    guessed = {"B": ScoreName("B", "", "reward"), "B_part": ScoreName("B", "part", "component")}
    guessed["B_right"] = ScoreName("B", "right", "check")
    assert score_names([*known, *guessed], schema) == known | guessed
    assert score_names(["A_b", "A"], {}) == {"A_b": ScoreName("A", "b", "component"), "A": ScoreName("A", "", "reward")}


def test_schedule_picture(tmp_path: Path):
    draw_schedules(tmp_path / "schedules.png")
    with Image.open(tmp_path / "schedules.png") as image:
        assert image.width > 1000


def chromium(url: str, profile: Path, *flags: str) -> str:
    """Runs a headless browser on a page and returns its standard output."""
    command = [*browser_command(profile), *flags, url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIME_LIMIT).stdout


def test_browser_runs_our_script_and_no_prompt(run_dir: Path, tmp_path: Path):
    write(run_dir)
    dom = chromium((run_dir / "report" / "report.html").as_uri(), tmp_path / "profile", "--dump-dom")
    assert re.findall(r'<li data-index="(\d)"', dom) == ["2", "5", "0", "3", "1", "4"]
    assert 'data-sorted="gain"' in dom and "6 of 6 pairs" in dom
    assert "<title>attacked" not in dom and '<a href="#gallery">' in dom


def shown_pairs(browser: Browser) -> list[str]:
    return browser.evaluate("cards.filter(card => !card.hidden).map(card => card.dataset.index)")


def fits(browser: Browser) -> bool:
    """Asserts that nothing overflows to the right and that no text is smaller than 12 pixels."""
    sizes = "[...document.querySelectorAll('p, td, th, dt, dd, li, label, figcaption, a, button')]"
    sizes += ".every(e => parseFloat(getComputedStyle(e).fontSize) >= 12)"
    return browser.evaluate(f"document.documentElement.scrollWidth <= innerWidth && {sizes}")


def test_a_phone_without_network_and_with_a_keyboard_sorts_filters_and_zooms(
    run_dir: Path, other_run: Path, tmp_path: Path
):
    write(run_dir)
    scores = {"baseline_scores": run_dir / "base.json", "tuned_scores": run_dir / "tuned.json"}
    compared, _ = report.write_report([run_dir, other_run], **scores, output_dir=tmp_path / "compared")
    with closing(Browser(tmp_path / "profile")) as browser:
        browser.open(compared.as_uri())
        assert fits(browser) and browser.evaluate("document.querySelectorAll('.group[open]').length") == 1
        browser.open((run_dir / "report" / "report.html").as_uri())
        assert fits(browser)
        assert shown_pairs(browser) == ["2", "5", "0", "3", "1", "4"]  # largest gain first, the failed one last
        browser.press_until("Tab", "document.activeElement.id === 'order'")
        browser.press("ArrowDown")
        assert shown_pairs(browser) == ["1", "3", "0", "5", "2", "4"]  # largest loss
        browser.press_until("Tab", "document.activeElement.id === 'filter'")
        browser.press("ArrowDown")
        assert shown_pairs(browser) == ["0", "5", "2"]  # improved
        browser.press_until("Tab", "document.activeElement.matches('.pair')")
        browser.press("Enter")
        assert browser.evaluate("dialog.open") and "0.400 → 0.500" in browser.evaluate("dialog.innerText")
        browser.press("ArrowRight")
        assert "0.400 → 0.600" in browser.evaluate("dialog.innerText")
        width = "one('dialog img').getBoundingClientRect().width"
        before = browser.evaluate(width)
        browser.press("+")
        assert browser.evaluate(width) == pytest.approx(2 * before, abs=2)
        browser.press("+")
        middle = browser.evaluate("one('dialog .frame').scrollLeft")
        browser.press("ArrowRight")
        right = "document.querySelectorAll('dialog .frame')[1].scrollLeft"  # of the second picture: both move
        browser.wait(f"Math.abs({right} - {middle + 60}) <= 1 && {middle} > 0")
        browser.press("Escape")
        browser.wait("!dialog.open && document.activeElement.closest('li').dataset.index === '5'")
        assert browser.requests and all(url.startswith(("file:", "data:")) for url in browser.requests)


def test_a_live_page_remembers_its_choices_but_no_reward_of_another_run(other_run: Path, tmp_path: Path):
    with LiveReport(other_run, 0) as live, closing(Browser(tmp_path / "profile", online=True)) as browser:
        url = f"http://127.0.0.1:{live.server_port}/"
        browser.open(url)
        browser.evaluate("sessionStorage.setItem('model', 'OfAnotherRun'), sessionStorage.setItem('order', 'index')")
        browser.open(url)
        assert browser.evaluate("[one('#model').value, one('#order').value]") == [MODEL, "index"]
        assert shown_pairs(browser) == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screenshot_follows_the_readers_theme(run_dir: Path, tmp_path: Path, theme: str):
    write(run_dir)
    shot = tmp_path / "shot.png"
    dark = ["--blink-settings=preferredColorScheme=0"] * (theme == "dark")
    flags = [*dark, "--window-size=900,2600", f"--screenshot={shot}"]
    chromium((run_dir / "report" / "report.html").as_uri(), tmp_path / "profile", *flags)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("L"))
    assert (pixels[0, 0] < 60) == (theme == "dark")
    assert all(np.ptp(band) > 100 for band in np.array_split(pixels, 8))  # no empty stretch: curves, pictures, tables
