r"""Report of a training run: PNG curves and one self-contained HTML page, for a finished or a running training.

    python -m fastvideo.eval.report --run_dir outputs/run \
        --baseline_scores outputs/base_scores.json --tuned_scores outputs/tuned_scores.json

reads args.json, metrics.jsonl and images/ of the run (whatever is there) and the scores that fastvideo.eval.eval_reward
wrote for pictures of the base and the tuned model with the same seeds. The page needs no network and no other file.
"""

import base64
import html
import io
import json
import math
import re
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastvideo.config import flag, parse_dataclass
from fastvideo.eval.plots import (
    CSS_COLOURS,
    STYLE,
    column,
    describe,
    draw,
    draw_schedules,
    first_last,
    inline_svg,
    number,
    plan_plots,
)  # fmt: skip
from fastvideo.eval.statistics import mean_and_error
from fastvideo.utils.files import write_bytes

import matplotlib
import numpy as np
from PIL import Image

SECRET = re.compile(r"(api_?key|wandb_key|token|secret|password)$", re.IGNORECASE)


@dataclass
class ReportConfig:
    run_dir: str | None = flag(None, "output directory of the training run")
    baseline_scores: str | None = flag(None, "scores JSON of the base model's pictures (fastvideo.eval.eval_reward)")
    tuned_scores: str | None = flag(None, "scores JSON of the tuned model's pictures, same prompts and seeds")
    output_dir: str | None = flag(None, "folder of the report; None: {run_dir}/report")
    title: str | None = flag(None, "title of the page; None: the run's experiment name")
    max_gallery: int = flag(60, "most before/after pairs shown, spread evenly over the ranking by score change")
    schedules: str | None = flag(None, "only draw the granular weight schedules to this image file, then exit")

    def __post_init__(self) -> None:
        if self.run_dir is None and self.schedules is None:
            raise ValueError("--run_dir: give the output directory of a training run")
        if (self.baseline_scores is None) != (self.tuned_scores is None):
            raise ValueError("--baseline_scores and --tuned_scores: give both or neither")
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


# --------------------------------------------------------------------------------------------------- before and after


@dataclass
class Pair:
    """The same prompt and seed before and after training. scores: model -> (before, after), None where it failed."""

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
        models = dict.fromkeys([*before[i][2], *after[i][2]])
        scores = {m: (known[0].get(m), known[1].get(m)) for m in models}
        pairs.append(Pair(i, before[i][1], (before[i][0], after[i][0]), scores))
    return pairs


def compare(pairs: list[Pair]) -> list[dict]:
    """For each model: n complete pairs, mean and standard error before, after and of the change, win rate, failed."""
    rows = []
    for model in dict.fromkeys(m for pair in pairs for m in pair.scores):
        complete = [p for p in pairs if math.isfinite(p.change(model))]
        row = {"model": model, "n": len(complete), "failed": len(pairs) - len(complete)}
        if complete:
            prompts = [p.prompt for p in complete]
            scores = np.array([p.scores[model] for p in complete], dtype=np.float64)
            row["before"], row["after"] = (mean_and_error(side, prompts) for side in scores.T)
            row["change"] = mean_and_error(scores[:, 1] - scores[:, 0], prompts)
            row["improved"] = float((scores[:, 1] > scores[:, 0]).mean())
        rows.append(row)
    return rows


def with_error(value: tuple[float, float], signed: bool = False) -> str:
    """Mean ± standard error, with two digits of the error."""
    error = value[1]
    digits = min(1 - math.floor(math.log10(error)), 8) if error > 0 else None
    return f"{number(value[0], signed, digits)} ± {number(error, digits=digits)}"


def score_row(row: dict) -> str:
    """A row of the table of held-out rewards; data-label names the column where a phone stacks the cells."""
    known = row["n"] > 0
    cells = {
        "Before": with_error(row["before"]) if known else "–",
        "After": with_error(row["after"]) if known else "–",
        "Change": f"<b>{with_error(row['change'], signed=True)}</b>" if known else "–",
        "Improved": f"{row['improved']:.0%}" if known else "–",
        "Pairs": f"{row['n']:,}",
    }
    values = "".join(f'<td data-label="{label}">{value}</td>' for label, value in cells.items())
    return f'<tr><th scope="row">{html.escape(row["model"])}</th>{values}</tr>'


def image_tag(path: Path, alt: str, size: int = 512) -> str:
    """The picture inside the page: small ones as they are, large ones as JPEG of at most `size` pixels a side."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError:
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


def gallery(pairs: list[Pair], models: list[str], most: int) -> str:
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
                f"<figure>{image_tag(pair.images[i], f'{side}: {pair.prompt}')}"
                f'<figcaption>{side} <b class="{side}">{score}</b></figcaption></figure>'
            )
        change = pair.change(models[0])
        items.append(
            f'<li data-index="{pair.index}" data-scores="{html.escape(json.dumps(pair.scores))}">'
            f'<button type="button" class="pair" aria-label="Enlarge pair {pair.index}">{"".join(sides)}</button>'
            f'<p><b class="change" data-sign="{sign(change)}">{number(change, True)}</b> '
            f"{html.escape(pair.prompt)}</p></li>"
        )
    return "\n".join(items)


def sign(value: float) -> str:
    return "up" if value > 0 else "down" if value < 0 else "flat"


# ---------------------------------------------------------------------------------------------------------- the page


def headline(rows: list[dict], settings: dict, scores: list[dict]) -> list[tuple[str, str, str]]:
    """Tiles: (label, number, what it means)."""
    tiles = []
    if scores and scores[0]["n"]:
        row = scores[0]
        text = f"{with_error(row['change'], signed=True)}, {row['n']} pairs, {row['model']}"
        tiles.append(("Held-out reward", f"{number(row['before'][0])} → {number(row['after'][0])}", text))
    first, last, k = first_last(column(rows, "reward"))
    if k:
        text = f"mean of the first and the last {k} iterations" if k > 1 else "first and last iteration"
        tiles.append(("Training reward", f"{number(first)} → {number(last)}", text))
    planned = settings.get("max_train_steps")
    done = max((int(row.get("step", i)) for i, row in enumerate(rows, 1)), default=0)
    tiles.append(("Iterations", f"{done:,}", f"of {planned:,} planned" if isinstance(planned, int) else "so far"))
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


def remarks(rows: list[dict], broken: int, scores: list[dict]) -> list[str]:
    """What went less than well, in sentences."""
    found = [] if rows else ["metrics.jsonl has no finished iteration yet."]
    if broken:
        found.append(f"Unfinished lines of metrics.jsonl left out: {broken}.")
    for key, text in (
        ("skipped_steps", "Optimizer steps skipped because of numbers that are not finite"),
        ("failed_rewards", "Rewards that failed during training"),
        ("zero_spread_groups", "Groups of images with equal rewards, which teach nothing"),
    ):
        count = int(np.nansum(column(rows, key)))
        if count:
            found.append(f"{text}: {count:,}.")
    found += [f"Pairs left out of {r['model']} because a score failed: {r['failed']}." for r in scores if r["failed"]]
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


def write_report(
    run_dir: str | Path,
    baseline_scores: str | Path | None = None,
    tuned_scores: str | Path | None = None,
    output_dir: str | Path | None = None,
    title: str | None = None,
    max_gallery: int = 60,
) -> tuple[Path, list[dict]]:
    """Writes report.html and a PNG of each plot; returns the page's path and the rows of `compare` (empty: no scores).

    Raises ValueError, one line, for a run without metrics.jsonl and for scores that can't be paired.
    """
    run_dir = Path(run_dir)
    output_dir = Path(output_dir or run_dir / "report")
    if not (run_dir / "metrics.jsonl").is_file():
        raise ValueError(f"--run_dir {run_dir}: no metrics.jsonl in it; give the --output_dir of a training run")
    rows, broken = read_metrics(run_dir / "metrics.jsonl")
    settings = read_settings(run_dir)
    pairs = read_pairs(Path(baseline_scores), Path(tuned_scores)) if baseline_scores and tuned_scores else []
    scores = compare(pairs)
    output_dir.mkdir(parents=True, exist_ok=True)

    curves = []
    with matplotlib.rc_context(STYLE):
        steps = np.array([float(row.get("step", i)) for i, row in enumerate(rows, 1)])
        for plot in plan_plots(rows, settings):
            figure = draw(plot, steps)
            figure.savefig(output_dir / f"{plot.name}.png", dpi=200)
            curves.append(
                f"<figure><h3>{plot.title}</h3>{inline_svg(figure, describe(plot), plot.name)}"
                f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
            )

    grids = sorted(path for path in (run_dir / "images").glob("iteration_*.png") if path.stem[10:].isdigit())
    grids = [grids[i] for i in sorted(set(np.linspace(0, len(grids) - 1, min(6, len(grids))).round().astype(int)))]
    samples = [
        f"<figure>{image_tag(path, f'samples of iteration {int(path.stem[10:])}', size=640)}"
        f"<figcaption>iteration {int(path.stem[10:])}</figcaption></figure>"
        for path in grids
    ]
    models = [row["model"] for row in scores]
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    title = title or str(settings.get("experiment_name") or run_dir.resolve().name)
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime((run_dir / "metrics.jsonl").stat().st_mtime))
    what = [str(settings[k]) for k in ("algorithm", "reward_model", "pretrained_model_name_or_path") if settings.get(k)]
    page = string.Template(template).substitute(
        script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
        colours="".join(f"--{name}:{colour};" for name, colour in CSS_COLOURS.items()),
        title=html.escape(title),
        subtitle=html.escape(" · ".join([*what, f"last iteration logged {written}"])),
        tiles="".join(map(tile, headline(rows, settings, scores))),
        remarks="".join(f"<li>{html.escape(text)}</li>" for text in remarks(rows, broken, scores)),
        scores="".join(map(score_row, scores)),
        curves="".join(curves),
        models="".join(f"<option>{html.escape(m)}</option>" for m in models),
        pairs=gallery(pairs, models, max_gallery) if models else "",
        pair_count=f"{len(pairs):,}",
        samples="".join(samples),
        settings="".join(
            f"<div><dt>{html.escape(str(k))}</dt><dd>{html.escape(shown(str(k), v))}</dd></div>"
            for k, v in settings.items()
        ),
    )
    write_bytes(output_dir / "report.html", page.encode(errors="replace"))
    return output_dir / "report.html", scores


def main(argv: Sequence[str] | None = None) -> Path | None:
    """The command line; returns the path of report.html."""
    config = parse_dataclass(ReportConfig, argv, __doc__)
    if config.schedules:
        draw_schedules(config.schedules)
        return None
    path, scores = write_report(
        config.run_dir, config.baseline_scores, config.tuned_scores, config.output_dir, config.title, config.max_gallery
    )
    width = max((len(row["model"]) for row in scores), default=0)
    for row in scores:
        if row["n"]:
            sides = [with_error(row["before"]), with_error(row["after"]), with_error(row["change"], signed=True)]
            print(
                f"{row['model']:<{width}}  before {sides[0]}  after {sides[1]}  change {sides[2]}  ({row['n']} pairs)"
            )
    print(f"report: {path}")
    return path


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
