"""The report of a run: readable numbers, nothing from outside, nothing of a prompt executed, checked in a browser."""

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
from fastvideo.eval.plots import column, compare_plots, draw_schedules, plan_plots, smoothed

import numpy as np
import pytest
from browser import Browser, browser_command
from PIL import Image

EVIL = "<script>document.title = 'attacked'</script> & \"quotes\" 'too' <img src=https://example.invalid/x.png> 🐟"
EVIL += "/" + "m" * 1900
MODEL = "ShapesRewardModel"
GAINS = [0.1, -0.3, 0.5, 0.0, None, 0.2]  # by index; None: a failed score


def metrics_row(step: int) -> dict:
    weights = {f"granular_weight_{c}": w for c, w in zip(("color", "form", "clean"), (0.5, 0.3, 0.2), strict=True)}
    parts = {f"reward_{MODEL}_{c}": 0.5 + step / 100 for c in ("color", "form", "clean")}
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
    """The same with another learning rate, half as long, and with two evaluations."""
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


def test_running_training_with_half_a_line_repeated_steps_and_missing_keys(tmp_path: Path):
    lines = [
        {"step": 1, "reward": 0.1},
        {"step": 2, "reward": None, "skipped_steps": float("inf"), "something_new": {"a": 1}},
        {"step": 1, "reward": 0.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "rew'
    (tmp_path / "metrics.jsonl").write_text(text)
    rows, broken = report.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["reward"] == 0.5 and broken == 1
    page, scores = report.write_report(tmp_path, output_dir=tmp_path / "elsewhere")
    assert scores == [] and "Unfinished lines of metrics.jsonl left out: 1." in page.read_text()
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "reward.png"]


def test_a_run_with_evaluations_shows_the_first_beside_the_last(other_run: Path):
    path, scores = report.write_report(other_run)
    page = path.read_text(encoding="utf-8")
    assert scores[0]["n"] == 5 and "Iteration 0: a large circle 0" in page and "Iteration 15: a large circle 0" in page
    assert "<dt>Best evaluation</dt><dd><b>0.450</b><span>iteration 15</span>" in page
    assert EVIL not in page and html.escape(EVIL) in page
    with Image.open(other_run / "report" / "evaluation.png") as image:
        assert image.width > 600


def test_a_run_resumed_with_other_evaluation_prompts_has_a_report_that_says_so(other_run: Path):
    path = other_run / "evaluation/000015/scores.json"
    path.write_text(path.read_text().replace("circle 0", "square 0"))
    page, scores = report.write_report(other_run)
    assert scores == [] and "<dt>Best evaluation</dt>" in page.read_text()
    assert re.search(r"No pictures are compared: .*index 0 has another prompt", page.read_text())


def test_a_comparison_has_a_line_a_setting_and_a_band_over_seeds(run_dir: Path, other_run: Path, tmp_path: Path):
    """Seeds with rewards 0.51 to 0.80 and 0.2 more make one line."""
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

    groups = report.group_runs([report.Run.read(path) for path in (run_dir, seed, other_run)])
    plots = {name: [plan_plots(run.rows, run.settings) for run in runs] for name, runs in groups.items()}
    reward = next(plot for plot in compare_plots(plots) if plot.name == "reward")
    name, other = groups
    assert np.allclose(reward.panels[0].series[name], np.arange(1, 31) / 100 + 0.6)
    assert np.allclose(reward.panels[0].spread[name], 0.2 / np.sqrt(2))
    assert np.isfinite(reward.panels[0].series[other]).sum() == 15 and other not in reward.panels[0].spread
    names = ["reward", "components", "granular_weights", "ratio", "optimisation", "window", "seconds", "evaluation"]
    assert sorted(p.stem for p in path.parent.glob("*.png")) == sorted(names)


def test_runs_evaluated_by_different_rewards_share_no_axis(other_run: Path):
    settings = json.loads((other_run / "args.json").read_text())
    rows = report.Run.read(other_run).rows
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
    page, rows = report.write_report(run_dir, run_dir / "base.json", run_dir / "tuned.json")
    assert "OnlyHere" not in page.read_text() and "OnlyHere" not in [row["model"] for row in rows]


def test_gallery_of_many_pairs_spans_best_to_worst(run_dir: Path):
    page, _ = report.write_report(run_dir, run_dir / "base.json", run_dir / "tuned.json", max_gallery=3)
    assert re.findall(r'<li data-index="(\d)"', page.read_text()) == ["2", "0", "4"]  # 4 has no score: last


def test_bad_input_is_one_clear_line(run_dir: Path):
    with pytest.raises(ValueError, match="--run_dir .* no metrics.jsonl"):
        report.write_report(run_dir / "images")
    (run_dir / "metrics.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="--baseline_scores .* not a scores file"):
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
        MODEL, f"color ({MODEL})", f"form ({MODEL})", f"clean ({MODEL})", "HPSClipRewardModel"
    ]  # fmt: skip
    assert np.isnan(column([{"a": "text"}, {"a": None}, {}], "a")).all()


def test_schedule_picture(tmp_path: Path):
    draw_schedules(tmp_path / "schedules.png")
    with Image.open(tmp_path / "schedules.png") as image:
        assert image.width > 1000


def chromium(url: str, profile: Path, *flags: str) -> str:
    """Runs a headless browser on a page and returns its standard output."""
    command = [*browser_command(profile), *flags, url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_browser_runs_our_script_and_no_prompt(run_dir: Path, tmp_path: Path):
    write(run_dir)
    dom = chromium((run_dir / "report" / "report.html").as_uri(), tmp_path / "profile", "--dump-dom")
    assert re.findall(r'<li data-index="(\d)"', dom) == ["2", "5", "0", "3", "1", "4"]
    assert 'data-sorted="gain"' in dom and "6 of 6 pairs" in dom
    assert "<title>attacked" not in dom and '<a href="#gallery">' in dom


def shown_pairs(browser: Browser) -> list[str]:
    return browser.evaluate("cards.filter(card => !card.hidden).map(card => card.dataset.index)")


def fits(browser: Browser) -> bool:
    """Nothing sticks out to the right, and no text is smaller than 12 pixels."""
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
        assert fits(browser)
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
