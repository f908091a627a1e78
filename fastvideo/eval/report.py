r"""Report of training runs: PNG curves and one self-contained HTML page, for finished and for running ones.

    python -m fastvideo.eval.report --run_dir outputs/run \
        --baseline_scores outputs/base_scores.json --tuned_scores outputs/tuned_scores.json
    python -m fastvideo.eval.report --run_dir outputs/seed1 outputs/seed2 outputs/other     (compares them)

reads args.json, metrics.jsonl, images/ and evaluation/ of the run (whatever is there) and the scores that
fastvideo.eval.eval_reward wrote for pictures of the base and the tuned model with the same seeds. Without such scores
the first and the last evaluation of --eval_steps are shown, of several runs the last ones of the first and last run.
before_after.png has the first pictures of both sides, unselected.
Runs that differ in nothing but seeds are one line with a band. The page needs no network and no other file; beside it
summary.json has its first numbers. Where scores have a check (see statistics.py), everything leads with it.
"""

import base64
import html
import io
import json
import math
import re
import string
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastvideo.cli import flag, parse_dataclass
from fastvideo.config import PLACES
from fastvideo.eval.hacking import LIMITS
from fastvideo.eval.live import LiveReport
from fastvideo.eval.plots import (
    CSS_COLOURS,
    STYLE,
    Column,
    column,
    compare_plots,
    describe,
    draw,
    draw_pairs,
    draw_schedules,
    evaluation_measure,
    first_last,
    inline_svg,
    number,
    plan_plots,
    read_picture,
)  # fmt: skip
from fastvideo.eval.statistics import RIGHT, is_check, mean_and_error, score_label, win_rate
from fastvideo.io.files import evaluation_folder, write_bytes, write_json
from fastvideo.utils.picture_measures import APPEARANCE

import matplotlib
import numpy as np

SECRET = re.compile(r"(api_?key|wandb_key|token|secret|password)$", re.IGNORECASE)


@dataclass
class ReportConfig:
    run_dir: list[Path] = flag([], "output directory of the training run; several are compared", metavar="DIR")
    baseline_scores: str | None = flag(None, "scores JSON of the base model's pictures (fastvideo.eval.eval_reward)")
    tuned_scores: str | None = flag(None, "scores JSON of the tuned model's pictures, same prompts and seeds")
    output_dir: str | None = flag(None, "folder of the report; None: {run_dir}/report, of the first run")
    title: str | None = flag(None, "title of the page; None: the run's experiment name")
    max_gallery: int = flag(60, "most before/after pairs shown, spread evenly over the ranking by score change")
    serve_report: int | None = flag(None, "show it at this port of this machine, refreshed while the run goes on")
    schedules: str | None = flag(None, "only draw the granular weight schedules to this image file, then exit")

    def __post_init__(self) -> None:
        if not self.run_dir and self.schedules is None:
            raise ValueError("--run_dir: give the output directory of a training run")
        if (self.baseline_scores is None) != (self.tuned_scores is None):
            raise ValueError("--baseline_scores and --tuned_scores: give both or neither")
        if self.serve_report is not None and len(self.run_dir) != 1:
            raise ValueError(f"--serve_report {self.serve_report}: give one --run_dir")
        if self.max_gallery < 0:
            raise ValueError(f"--max_gallery {self.max_gallery}: must be at least 0")


def read_metrics(path: Path) -> tuple[list[dict], int]:
    """Rows of metrics.jsonl in order of step and the number of unreadable lines.

    A running training may be in the middle of its last line, a killed one may have left half a line. A step that was
    trained again after a resume counts once, with its last values.
    """
    rows, broken = {}, 0
    for i, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[int(row.get("step", i))] = row
        except (ValueError, AttributeError, TypeError):
            broken += 1
    return [rows[step] for step in sorted(rows)], broken


@dataclass
class Run:
    """What a training left in its folder. broken: unreadable lines of metrics.jsonl; version: of that file."""

    folder: Path
    rows: list[dict]
    broken: int
    settings: dict
    version: str

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises ValueError, one line, for a folder without metrics.jsonl."""
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise ValueError(f"--run_dir {folder}: no metrics.jsonl in it; give the --output_dir of a training run")
        version = str(path.stat().st_mtime_ns)
        return cls(folder, *read_metrics(path), read_settings(folder), version)

    @property
    def name(self) -> str:
        return str(self.settings.get("experiment_name") or self.folder.resolve().name)

    @property
    def iterations(self) -> int:
        return max((int(row.get("step", i)) for i, row in enumerate(self.rows, 1)), default=0)

    def evaluations(self) -> list[Path]:
        """The scores of the evaluations that metrics.jsonl knows of, in order."""
        steps = (row["step"] for row in self.rows if "evaluation_reward" in row)
        paths = (evaluation_folder(self.folder, step) / "scores.json" for step in steps)
        return [path for path in paths if path.is_file()]


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Name -> the runs whose settings differ in nothing but seeds and places, in the given order.

    The name is the runs' own where it tells the groups apart, else the first one's folder, else its whole path.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        same = {k: v for k, v in run.settings.items() if k not in (*PLACES, "seed", "sampler_seed")}
        found.setdefault(json.dumps(same, sort_keys=True) if same else str(run.folder), []).append(run)
    groups = list(found.values())
    for names in (
        [group[0].name for group in groups],
        [group[0].folder.resolve().name for group in groups],
        [str(group[0].folder) for group in groups],
    ):
        if len(set(names)) == len(groups):
            break
    return dict(zip(names, groups, strict=True))


# --------------------------------------------------------------------------------------------------- before and after


@dataclass
class Pair:
    """The same prompt and seed before and after training, or in two runs. scores: model -> (before, after), None where
    it failed.
    """

    index: int
    prompt: str
    images: tuple[Path, Path]
    scores: dict[str, tuple[float | None, float | None]]

    def change(self, model: str) -> float:
        before, after = self.scores.get(model, (None, None))
        return math.nan if before is None or after is None else after - before


def read_pairs(baseline: Path, tuned: Path) -> list[Pair]:
    """Pairs the entries of two scores files by index.

    Raises ValueError for a file that is no scores file, for no common index and for different prompts at one index.
    """
    sides = []
    for flag_name, path in (("baseline_scores", baseline), ("tuned_scores", tuned)):
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            sides.append({int(e["index"]): (path.parent / e["image"], e["prompt"], dict(e["reward"])) for e in entries})
        except OSError as error:
            raise ValueError(f"--{flag_name} {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--{flag_name} {path}: not a scores file of fastvideo.eval.eval_reward: {error!r}"
            ) from None
    before, after = sides
    common = sorted(before.keys() & after.keys())
    if not common:
        raise ValueError(f"--tuned_scores {tuned}: no index in common with {baseline}")
    pairs = []
    for i in common:
        if before[i][1] != after[i][1]:
            raise ValueError(f"--tuned_scores {tuned}: index {i} has another prompt than in {baseline}")
        known = [{m: v for m, v in side[i][2].items() if number(v) != "–"} for side in sides]
        models = [m for m in before[i][2] if m in after[i][2]]  # what one side never scored can't have failed
        scores = {m: (known[0].get(m), known[1].get(m)) for m in models}
        pairs.append(Pair(i, before[i][1], (before[i][0], after[i][0]), scores))
    return pairs


def compare(pairs: list[Pair]) -> list[dict]:
    """For each model: n complete pairs, mean and standard error before, after and of the change, win rate, failed.

    The check leads.
    """
    rows = []
    for model in sorted(dict.fromkeys(m for pair in pairs for m in pair.scores), key=lambda m: not is_check(m)):
        complete = [p for p in pairs if math.isfinite(p.change(model))]
        row = {"model": model, "n": len(complete), "failed": len(pairs) - len(complete)}
        if complete:
            prompts = [p.prompt for p in complete]
            scores = np.array([p.scores[model] for p in complete], dtype=np.float64)
            row["before"], row["after"] = (mean_and_error(side, prompts) for side in scores.T)
            row["change"] = mean_and_error(scores[:, 1] - scores[:, 0], prompts)
            row["improved"] = win_rate(scores[:, 1] - scores[:, 0])
        rows.append(row)
    return rows


def read_signs(tuned: str | Path | None) -> list[str]:
    """The signs of reward hacking in the summary that eval_reward wrote beside the tuned model's scores, if it did."""
    try:
        summary = json.loads(Path(tuned).with_name(f"{Path(tuned).stem}_summary.json").read_text(encoding="utf-8"))
        return list(map(str, summary["signs"]))
    except (OSError, ValueError, KeyError, TypeError):  # none, or the file of something else
        return []


def summary_of(runs: list[Run], scores: list[dict]) -> dict[str, Any]:
    """The content of summary.json, None for what isn't known: of several runs seconds and iterations aren't."""
    check = next((row for row in scores if is_check(row["model"])), {})
    (before, before_error), (after, after_error) = (check.get(side, (None, None)) for side in ("before", "after"))
    run = runs[0] if len(runs) == 1 else None
    seconds = column(run.rows, "seconds_total") if run else np.empty(0)
    found = {
        "right_before": before,
        "right_after": after,
        "right_before_error": before_error,
        "right_after_error": after_error,
        "pictures": scores[0]["n"] if scores else None,
        "seconds_of_training": float(np.nansum(seconds)) if np.isfinite(seconds).any() else None,
        "iterations": run.iterations if run else None,
        "scores": scores,
    }
    return json.loads(json.dumps(found), parse_constant=lambda _: None)  # errors of a single prompt are NaN


def with_error(value: tuple[float, float], signed: bool = False, digits: int | None = None) -> str:
    """Mean ± standard error. digits: decimals; None: two digits of the error."""
    error = value[1]
    if digits is None and error > 0:
        digits = min(1 - math.floor(math.log10(error)), 8)
    return f"{number(value[0], signed, digits)} ± {number(error, digits=digits)}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of texts, empty without rows. Each row begins with its heading; data-label names the column where a
    phone stacks the cells.
    """
    if not rows:
        return ""
    columns = [html.escape(label) for label in columns]
    head = "".join(f'<th scope="col">{label}</th>' for label in columns)
    body = []
    for name, *cells in rows:
        pairs = zip(columns[1:], cells, strict=True)
        values = "".join(f'<td data-label="{label}">{html.escape(cell)}</td>' for label, cell in pairs)
        body.append(f'<tr><th scope="row">{html.escape(name)}</th>{values}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def score_row(row: dict) -> list[str]:
    """A row of the table of scores on the same prompts."""
    name, digits = score_label(row["model"]), 2 if is_check(row["model"]) else None
    if not row["n"]:
        return [name, "–", "–", "–", "–", "0"]
    sides = [with_error(row[side], side == "change", digits) for side in ("before", "after", "change")]
    return [name, *sides, f"{row['improved']:.0%}", f"{row['n']:,}"]


def shares(row: dict) -> list[list[str]]:
    """Of a check: mean and standard error before and after."""
    return [[number(value, digits=2) for value in row[side]] for side in ("before", "after")]


def score_line(row: dict, width: int) -> str:
    """The same for a terminal, with names filled up to `width`; of a check the two shares."""
    if is_check(row["model"]):
        (before, before_error), (after, after_error) = shares(row)
        return f"{RIGHT}  before {before}  after {after}  ({row['n']} pictures, ± {before_error} and ± {after_error})"
    before, after, change = (with_error(row[side], side == "change") for side in ("before", "after", "change"))
    return f"{row['model']:<{width}}  before {before}  after {after}  change {change}  ({row['n']} pairs)"


def over_runs(values: Sequence[float]) -> str:
    """Mean and, of several runs, the standard deviation over them."""
    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return number(known[0]) if known else "–"
    return with_error((float(np.mean(known)), float(np.std(known, ddof=1))))


def run_row(name: str, runs: list[Run]) -> list[str]:
    """A row of the table of compared runs."""
    rewards = [first_last(column([row for row in run.rows if row.get("step") != 0], "reward")) for run in runs]
    scores = [column(run.rows, "evaluation_reward") for run in runs]
    scores = [values[np.isfinite(values)] for values in scores]
    seconds = [column(run.rows, "seconds_total") for run in runs]
    return [
        name,
        f"{len(runs)}",
        " ".join(dict.fromkeys(f"{run.iterations:,}" for run in runs)),
        over_runs([first for first, _, _ in rewards]),
        over_runs([last for _, last, _ in rewards]),
        ", ".join(dict.fromkeys(evaluation_measure(run.settings) for run in runs)) if any(map(len, scores)) else "–",
        over_runs([values[-1] if len(values) else math.nan for values in scores]),
        over_runs([values.max() if len(values) else math.nan for values in scores]),
        over_runs([float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan for values in seconds]),
    ]


def differences(groups: dict[str, list[Run]]) -> list[list[str]]:
    """Rows: a setting that isn't the same in all runs, and its values in each group."""
    names = dict.fromkeys(k for runs in groups.values() for run in runs for k in run.settings if k not in PLACES)
    found = []
    for name in names:
        values = [[shown(name, run.settings.get(name)) for run in runs] for runs in groups.values()]
        if len({value for group in values for value in group}) > 1:
            found.append([name, *(", ".join(dict.fromkeys(group)) for group in values)])
    return found


def image_tag(path: Path, alt: str, size: int = 512) -> str:
    """The picture inside the page: small ones as they are, large ones as JPEG of at most `size` pixels a side."""
    image = read_picture(path)
    if image is None:
        return f'<span class="missing" role="img" aria-label="{html.escape(alt)}: no such picture">no picture</span>'
    small, buffer = max(image.size) <= 128, io.BytesIO()
    if small:
        image.save(buffer, "PNG")
    else:
        image.thumbnail((size, size))
        image.save(buffer, "JPEG", quality=88)
    url = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    width, height = image.size
    pixels = ' class="pixels"' if small else ""
    return f'<img{pixels} src="{url}" width="{width}" height="{height}" alt="{html.escape(alt)}">'


def gallery(pairs: list[Pair], models: list[str], most: int, labels: tuple[str, str]) -> str:
    """List items, largest gain of the first model first; of many pairs an even selection from best to worst."""
    ranked = sorted(pairs, key=lambda p: (math.isnan(p.change(models[0])), -p.change(models[0]), p.index))
    if len(ranked) > most:
        ranked = [ranked[i] for i in np.linspace(0, len(ranked) - 1, most).round().astype(int)]
    items = []
    for pair in ranked:
        sides = []
        for i, side in enumerate(("before", "after")):
            score = number(pair.scores.get(models[0], (None, None))[i])
            sides.append(
                f'<figure><div class="frame">{image_tag(pair.images[i], f"{labels[i]}: {pair.prompt}")}</div>'
                f'<figcaption>{html.escape(labels[i])} <b class="{side}">{score}</b></figcaption></figure>'
            )
        change = pair.change(models[0])
        items.append(
            f'<li data-index="{pair.index}" data-scores="{html.escape(json.dumps(pair.scores))}">'
            f'<button type="button" class="pair" aria-label="Enlarge pair {pair.index}">{"".join(sides)}</button>'
            f'<p><b class="change" data-sign="{sign(change)}">{number(change, True)}</b> '
            f"{html.escape(pair.prompt)}</p></li>"
        )
    return "\n".join(items)


def first_pictures(pairs: list[Pair], most: int = 12) -> list[Column]:
    """A sample that nobody chose: the first picture, by index, of each of the first prompts."""
    firsts: dict[str, Pair] = {}
    for pair in sorted(pairs, key=lambda pair: pair.index):
        firsts.setdefault(pair.prompt, pair)
    columns = []
    for pair in list(firsts.values())[:most]:
        checks = [scores for model, scores in pair.scores.items() if is_check(model)]
        wrong = tuple(any(scores[side] == 0 for scores in checks) for side in (0, 1)) if checks else None
        columns.append(Column(pair.prompt, pair.images, wrong))
    return columns


def sign(value: float) -> str:
    return "up" if value > 0 else "down" if value < 0 else "flat"


# ---------------------------------------------------------------------------------------------------------- the page


def headline(run: Run, scores: list[dict]) -> list[tuple[str, str, str]]:
    """Tiles: (label, number, what it means)."""
    tiles, settings, rows = [], run.settings, [row for row in run.rows if row.get("step") != 0]
    for row in (row for row in scores if row["n"]):
        if is_check(row["model"]):
            (before, before_error), (after, after_error) = shares(row)
            tiles.append((RIGHT, f"{before} → {after}", f"± {before_error} and ± {after_error}, {row['n']} pictures"))
        else:
            text = f"{with_error(row['change'], signed=True)}, {row['n']} pairs, {row['model']}"
            tiles.append(("Fixed prompts", f"{number(row['before'][0])} → {number(row['after'][0])}", text))
            break
    first, last, k = first_last(column(rows, "reward"))
    if k:
        text = f"mean of the first and the last {k} iterations" if k > 1 else "first and last iteration"
        tiles.append(("Training reward", f"{number(first)} → {number(last)}", text))
    evaluated = {row.get("step"): row for row in run.rows if "evaluation_reward" in row}
    best = next((row.get("evaluation_best_iteration") for row in reversed(evaluated.values())), None)
    if best in evaluated:
        tiles.append(("Best evaluation", number(evaluated[best]["evaluation_reward"]), f"iteration {best:,}"))
    planned = settings.get("max_train_steps")
    planned = f"of {planned:,} planned" if isinstance(planned, int) else "so far"
    tiles.append(("Iterations", f"{run.iterations:,}", planned))
    seconds = column(rows, "seconds_total")
    if np.isfinite(seconds).any():
        total = np.nansum(seconds)
        total = (
            f"{total / 3600:.1f} h" if total > 7200 else f"{total / 60:.1f} min" if total > 120 else f"{total:.0f} s"
        )
        tiles.append(("Seconds/iteration", f"{np.nanmedian(seconds):,.1f}", f"median; {total} in all"))
    images = column(rows, "images")
    if np.isfinite(images).any():
        tiles.append(("Images", f"{int(np.nansum(images)):,}", "sampled and rewarded"))
    return tiles


def tile(parts: tuple[str, str, str]) -> str:
    label, value, text = map(html.escape, parts)
    wide = ' class="wide"' if "→" in value else ""
    return f"<div{wide}><dt>{label}</dt><dd><b>{value}</b><span>{text}</span></dd></div>"


def remarks(run: Run) -> list[str]:
    """What went less than well in a run, in sentences."""
    found = [] if run.rows else ["metrics.jsonl has no finished iteration yet."]
    if run.broken:
        found.append(f"Unfinished lines of metrics.jsonl left out: {run.broken}.")
    for key, text in (
        ("skipped_steps", "Optimizer steps skipped because of numbers that are not finite"),
        ("failed_rewards", "Rewards that failed during training"),
        ("evaluation_failed_rewards", "Rewards that failed in evaluations"),
        ("zero_spread_groups", "Groups of images with equal rewards, which teach nothing"),
    ):
        count = int(np.nansum(column(run.rows, key)))
        if count:
            found.append(f"{text}: {count:,}.")
    for name in APPEARANCE:  # not of diversity, which depends on where the window is
        first, last, k = first_last(column(run.rows, f"hacking_{name}"))
        if k > 1 and first > 0 and abs(change := last / first - 1) > LIMITS[name]:  # k 1: other prompts look different
            moved = f"{'rose' if change > 0 else 'fell'} by {abs(change):,.0%}".replace("%", " %")
            look = name.replace("_", " ").capitalize()
            found.append(f"{look} of the training pictures {moved}: look at the samples, this can be reward hacking.")
    return found


def shown(name: str, value: Any) -> str:
    """A setting as text, without anything secret."""
    if SECRET.search(name) and value:
        return "hidden"
    text = "–" if value in (None, "") else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"(?<=://)[^/@\s]+@", "…@", text)


def read_settings(run_dir: Path) -> dict:
    path = run_dir / "args.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--run_dir {run_dir}: args.json is no JSON: {error}") from None
    return settings if isinstance(settings, dict) else {}


def choose_pairs(
    runs: list[Run], baseline: str | Path | None, tuned: str | Path | None
) -> tuple[list[Pair], tuple[str, str], list[str]]:
    """The pairs of the gallery, what their sides are called, and a remark where evaluations can't be paired."""
    if baseline and tuned:
        return read_pairs(Path(baseline), Path(tuned)), ("Before", "After"), []
    first, last = runs[0].evaluations(), runs[-1].evaluations()
    if len(runs) == 1:
        chosen = first[:1] + last[1:][-1:]
        labels = [f"Iteration {int(path.parent.name)}" for path in chosen]
    else:
        chosen = first[-1:] + last[-1:]
        labels = [run.name for run in (runs[0], runs[-1])]
        if labels[0] == labels[1]:
            labels = [run.folder.resolve().name for run in (runs[0], runs[-1])]
    if len(chosen) < 2:
        return [], ("Before", "After"), []
    try:
        return read_pairs(*chosen), tuple(labels), []
    except ValueError as error:  # a run resumed with other --eval_prompts; runs with different ones
        return [], ("Before", "After"), [f"No pictures are compared: {error}."]


def sample_grids(run: Run, most: int, title: str = "") -> list[str]:
    """Figures of the pictures during training, evenly over the run."""
    grids = sorted(path for path in (run.folder / "images").glob("iteration_*.png") if path.stem[10:].isdigit())
    spaced = np.linspace(len(grids) - 1, 0, min(most, len(grids))).round().astype(int)
    figures = []
    for path in (grids[i] for i in sorted(set(spaced))):
        name = f"{title}iteration {int(path.stem[10:])}"
        figures.append(
            f"<figure>{image_tag(path, f'samples, {name}', size=640)}"
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
        )
    return figures


def settings_list(run: Run, title: str) -> str:
    entries = "".join(
        f"<div><dt>{html.escape(str(k))}</dt><dd>{html.escape(shown(str(k), v))}</dd></div>"
        for k, v in run.settings.items()
    )
    summary = f"<summary>{html.escape(title)}</summary>"
    return f'<details>{summary}<dl class="settings">{entries}</dl></details>' if entries else ""


def write_report(
    run_dir: str | Path | Sequence[str | Path],
    baseline_scores: str | Path | None = None,
    tuned_scores: str | Path | None = None,
    output_dir: str | Path | None = None,
    title: str | None = None,
    max_gallery: int = 60,
) -> tuple[Path, list[dict]]:
    """Writes report.html, summary.json and a PNG of each plot; returns the page's path and the rows of `compare`.

    Where there are pairs of pictures before_after.png has some of them, see `first_pictures`. run_dir: a run's folder,
    or several to compare. Without scores there are no rows. Raises ValueError, one line, for a
    run without metrics.jsonl and for scores that can't be paired.
    """
    runs = [Run.read(Path(path)) for path in ([run_dir] if isinstance(run_dir, str | Path) else run_dir)]
    groups, several = group_runs(runs), len(runs) > 1
    output_dir = Path(output_dir or runs[0].folder / "report")
    pairs, labels, notes = choose_pairs(runs, baseline_scores, tuned_scores)
    scores = compare(pairs)
    output_dir.mkdir(parents=True, exist_ok=True)

    plots = {name: [plan_plots(run.rows, run.settings) for run in group] for name, group in groups.items()}
    curves = []
    with matplotlib.rc_context(STYLE):
        for plot in compare_plots(plots) if several else plan_plots(runs[0].rows, runs[0].settings):
            figure = draw(plot)
            figure.savefig(output_dir / f"{plot.name}.png", dpi=200)
            curves.append(
                f"<figure><h3>{plot.title}</h3>{inline_svg(figure, describe(plot), plot.name)}"
                f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
            )
        if pairs:
            draw_pairs(output_dir / "before_after.png", first_pictures(pairs), labels)

    if several:
        samples = [grid for name, group in groups.items() for grid in sample_grids(group[0], 1, f"{name}, ")]
    else:
        samples = sample_grids(runs[0], 6)
    notes += [f"{run.name}: {text}" if several else text for run in runs for text in remarks(run)]
    notes += [f"Pairs left out of {r['model']} because a score failed: {r['failed']}." for r in scores if r["failed"]]
    notes += [f"Against the baseline, {text}." for text in read_signs(tuned_scores)]
    models = sorted((row["model"] for row in scores), key=is_check)  # pictures are ranked by a score, not by yes or no
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    newest = max(int(run.version) for run in runs)
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest / 1e9))
    settings = runs[0].settings
    what = [str(settings[k]) for k in ("algorithm", "reward_model", "pretrained_model_name_or_path") if settings.get(k)]
    what = [f"{len(runs)} runs" if several else " · ".join(what), f"last iteration logged {written}"]
    columns = "Run,Seeds,Iterations,Reward at first,Reward at last,Evaluated by,Evaluation at last,Best evaluation"
    columns += ",Seconds/iteration"
    page = string.Template(template).substitute(
        script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
        colours="".join(f"--{name}:{colour};" for name, colour in CSS_COLOURS.items()),
        version=newest,
        title=html.escape(title or " and ".join(groups)),
        subtitle=html.escape(" · ".join(filter(None, what))),
        tiles="" if several else "".join(map(tile, headline(runs[0], scores))),
        remarks="".join(f"<li>{html.escape(text)}</li>" for text in notes),
        runs=table(columns.split(","), [run_row(name, group) for name, group in groups.items()] if several else []),
        scores=table(["Reward", *labels, "Change", "Improved", "Pairs"], list(map(score_row, scores))),
        curves="".join(curves),
        models="".join(f'<option value="{html.escape(m)}">{html.escape(score_label(m))}</option>' for m in models),
        pairs=gallery(pairs, models, max_gallery, labels) if models else "",
        pair_count=f"{len(pairs):,}",
        samples="".join(samples),
        differences=table(["Setting", *groups], differences(groups)) if several else "",
        settings="".join(
            settings_list(group[0], f"All settings of {name if several else 'the run'}")
            for name, group in groups.items()
        ),
    )
    write_bytes(output_dir / "report.html", page.encode(errors="replace"))
    write_json(output_dir / "summary.json", summary_of(runs, scores))
    return output_dir / "report.html", scores


def main(argv: Sequence[str] | None = None) -> Path | None:
    """The command line; returns the path of report.html."""
    config = parse_dataclass(ReportConfig, argv, __doc__)
    if config.schedules:
        draw_schedules(config.schedules)
        return None
    if config.serve_report is not None:
        with LiveReport(config.run_dir[0], config.serve_report), suppress(KeyboardInterrupt):
            threading.Event().wait()
        return None
    path, scores = write_report(
        config.run_dir, config.baseline_scores, config.tuned_scores, config.output_dir, config.title, config.max_gallery
    )
    width = max((len(row["model"]) for row in scores if not is_check(row["model"])), default=0)
    for row in scores:
        if row["n"]:
            print(score_line(row, width))
    for text in read_signs(config.tuned_scores):
        print(f"against the baseline, {text}")
    print(f"report: {path}")
    return path


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
