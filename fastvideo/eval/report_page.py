"""The report's HTML page, of tables, curves, pictures and settings, in the frame of report_template.html."""

import base64
import html
import io
import json
import math
import re
import string
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastvideo.config import PLACES
from fastvideo.eval.hacking import LIMITS
from fastvideo.eval.plots import (
    CSS_COLOURS,
    column,
    evaluation_measure,
    first_last,
    is_sum,
    picture_prompt,
    read_picture,
    weights_moved,
)
from fastvideo.eval.runs import Comparison, Pair, Run
from fastvideo.eval.statistics import RIGHT, number, with_error
from fastvideo.io.words import counted
from fastvideo.utils.picture_measures import APPEARANCE

import numpy as np

TEMPLATE = Path(__file__).with_name("report_template.html")
SECRET = re.compile(r"(api_?key|wandb_key|token|secret|password)$", re.IGNORECASE)
RUN_COLUMNS = (
    "Run",
    "Seeds",
    "Iterations",
    "Reward at first",
    "Reward at last",
    "Evaluated by",
    "Evaluation at last",
    "Best evaluation",
    "Seconds/iteration",
)


def page(
    groups: dict[str, list[Run]],
    comparison: Comparison,
    curves: Mapping[str, str],
    signs: Sequence[str],
    title: str | None,
    max_gallery: int,
) -> str:
    """The whole page.

    Args:
        groups: name -> runs, see `group_runs`. comparison: the pairs of pictures, if any. curves: title of a group ->
            its figures, as HTML.
        signs: sentences about the scores that hint at reward hacking. title: None: the groups' names.
        max_gallery: most pairs shown.
    """
    runs = [run for group in groups.values() for run in group]
    several, first = len(runs) > 1, runs[0]
    if several:
        samples = [grid for name, group in groups.items() for grid in sample_grids(group[0], 1, f"{name}, ")]
    else:
        samples = sample_grids(first, 6)
    notes = [f"No pictures are compared: {comparison.problem}."] if comparison.problem else []
    notes += [f"{run.name}: {text}" if several else text for run in runs for text in remarks(run)]
    notes += [
        f"Pairs left out of {row['model']} because a score failed: {row['failed']}."
        for row in comparison.rows
        if row["failed"]
    ]
    notes += [f"Against the baseline, {text}." for text in signs]
    # Pictures are ranked by a score first: yes or no gives no order.
    scores = sorted((row["model"] for row in comparison.rows), key=lambda name: name in comparison.checks)
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    newest = max(int(run.version) for run in runs)
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest / 1e9))
    names = ("algorithm", "reward_model", "pretrained_model_name_or_path")
    what = [str(first.settings[name]) for name in names if first.settings.get(name)]
    what = [f"{len(runs)} runs" if several else " · ".join(what), f"last iteration logged {written}"]
    run_rows = [run_row(name, group) for name, group in groups.items()] if several else []
    return string.Template(template).substitute(
        script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
        colours="".join(f"--{name}:{colour};" for name, colour in CSS_COLOURS.items()),
        version=newest,
        title=html.escape(title or " and ".join(groups)),
        subtitle=html.escape(" · ".join(filter(None, what))),
        tiles="" if several else "".join(map(tile, headline(first, comparison))),
        remarks="".join(f"<li>{html.escape(text)}</li>" for text in notes),
        runs=table(RUN_COLUMNS, run_rows),
        scores=table(
            ["Reward", *comparison.labels, "Change", "Improved", "Pairs"],
            [score_row(row, comparison) for row in comparison.rows],
        ),
        curves="".join(
            f'<details class="group" open><summary>{title}</summary><div class="curves">{figures}</div></details>'
            for title, figures in curves.items()
            if figures
        ),
        models="".join(
            f'<option value="{html.escape(name)}">{html.escape(comparison.label(name))}</option>' for name in scores
        ),
        pairs=gallery(comparison.pairs, scores[0], max_gallery, comparison.labels) if scores else "",
        pair_count=f"{len(comparison.pairs):,}",
        samples="".join(samples),
        differences=table(["Setting", *groups], differences(groups)) if several else "",
        settings="".join(
            settings_list(group[0], f"All settings of {name if several else 'the run'}")
            for name, group in groups.items()
        ),
    )


# ------------------------------------------------------------------------------------------------------------- tables


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of texts, empty without rows.

    Each row begins with its heading. On a phone the cells lie below each other; data-label then names their column.
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


def score_row(row: dict, comparison: Comparison) -> list[str]:
    """A row of the table of scores on the same prompts."""
    name, digits = comparison.label(row["model"]), 2 if row["model"] in comparison.checks else None
    if not row["n"]:
        return [name, "–", "–", "–", "–", "0"]
    sides = [with_error(row[side], side == "change", digits) for side in ("before", "after", "change")]
    return [name, *sides, f"{row['improved']:.0%}", f"{row['n']:,}"]


def over_runs(values: Sequence[float]) -> str:
    """Mean over runs, with the standard deviation where there are several."""
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
    """One row per setting that isn't the same in all runs: its name, and its values in each group."""
    names = dict.fromkeys(k for runs in groups.values() for run in runs for k in run.settings if k not in PLACES)
    found = []
    for name in names:
        values = [[shown(name, run.settings.get(name)) for run in runs] for runs in groups.values()]
        if len({value for group in values for value in group}) > 1:
            found.append([name, *(", ".join(dict.fromkeys(group)) for group in values)])
    return found


def shown(name: str, value: Any) -> str:
    """A setting as text, without anything secret."""
    if SECRET.search(name) and value:
        return "hidden"
    text = "–" if value in (None, "") else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"(?<=://)[^/@\s]+@", "…@", text)


def settings_list(run: Run, title: str) -> str:
    """All settings of a run, folded away under a title."""
    entries = "".join(
        f"<div><dt>{html.escape(str(k))}</dt><dd>{html.escape(shown(str(k), v))}</dd></div>"
        for k, v in run.settings.items()
    )
    summary = f"<summary>{html.escape(title)}</summary>"
    return f'<details>{summary}<dl class="settings">{entries}</dl></details>' if entries else ""


# --------------------------------------------------------------------------------------------------- tiles and remarks


def shares(row: dict) -> list[list[str]]:
    """For a check: [mean, standard error] before and after, as texts."""
    return [[number(value, digits=2) for value in row[side]] for side in ("before", "after")]


def headline(run: Run, comparison: Comparison) -> list[tuple[str, str, str]]:
    """Tiles: (label, number, what it means)."""
    tiles, settings, rows = [], run.settings, [row for row in run.rows if row.get("step") != 0]
    for row in (row for row in comparison.rows if row["n"]):
        if row["model"] in comparison.checks:
            (before, before_error), (after, after_error) = shares(row)
            tiles.append(
                (RIGHT, f"{before} → {after}", f"± {before_error} and ± {after_error}, {counted(row['n'], 'picture')}")
            )
        else:
            text = f"{with_error(row['change'], signed=True)}, {row['n']} pairs, {row['model']}"
            tiles.append(("Fixed prompts", f"{number(row['before'][0])} → {number(row['after'][0])}", text))
            break
    first, last, k = first_last(column(rows, "reward"))
    if k:
        text = f"mean of the first and the last {k} iterations" if k > 1 else "first and last iteration"
        text += "; not comparable, as weights moved" if weights_moved(rows) else ""
        tiles.append(("Training reward", f"{number(first)} → {number(last)}", text))
    evaluated = {row.get("step"): row for row in run.rows if "evaluation_reward" in row}
    best = next((row.get("evaluation_best_iteration") for row in reversed(evaluated.values())), None)
    if best in evaluated:
        measure = evaluation_measure(settings)
        text = f"iteration {best:,}, {'weighted sum of raw scores: ' if is_sum(measure) else ''}{measure}"
        tiles.append(("Best evaluation", number(evaluated[best]["evaluation_reward"]), text))
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
    """A tile of `headline` in HTML."""
    label, value, text = map(html.escape, parts)
    wide = ' class="wide"' if "→" in value else ""
    return f"<div{wide}><dt>{label}</dt><dd><b>{value}</b><span>{text}</span></dd></div>"


def remarks(run: Run) -> list[str]:
    """Sentences about what went wrong in a run."""
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
    if weights_moved(run.rows):
        found.append(
            "The weights of the reward's parts moved, so the training reward of one iteration can't be compared with "
            "that of another: look at the parts, and at evaluations, whose weights don't move."
        )
    for name in APPEARANCE:  # diversity is left out: it depends on where the window is
        first, last, k = first_last(column(run.rows, f"hacking_{name}"))
        # With k 1 single iterations would be compared, whose prompts differ and so their pictures.
        if k > 1 and first > 0 and abs(change := last / first - 1) > LIMITS[name]:
            moved = f"{'rose' if change > 0 else 'fell'} by {abs(change):,.0%}".replace("%", " %")
            look = name.replace("_", " ").capitalize()
            found.append(f"{look} of the training pictures {moved}: look at the samples, this can be reward hacking.")
    return found


# ----------------------------------------------------------------------------------------------------------- pictures


def image_tag(path: Path, alt: str, size: int = 512) -> str:
    """The picture inside the page: small ones as they are, large ones as JPEG of at most `size` pixels per side."""
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


def gallery(pairs: list[Pair], score: str, most: int, labels: tuple[str, str]) -> str:
    """List items of pairs, the largest gain of `score` first. More than `most` pairs are thinned evenly over this
    ranking.
    """
    ranked = sorted(pairs, key=lambda p: (math.isnan(p.change(score)), -p.change(score), p.index))
    if len(ranked) > most:
        ranked = [ranked[i] for i in np.linspace(0, len(ranked) - 1, most).round().astype(int)]
    items = []
    for pair in ranked:
        sides = []
        for i, side in enumerate(("before", "after")):
            value = number(pair.scores.get(score, (None, None))[i])
            sides.append(
                f'<figure><div class="frame">{image_tag(pair.images[i], f"{labels[i]}: {pair.prompt}")}</div>'
                f'<figcaption>{html.escape(labels[i])} <b class="{side}">{value}</b></figcaption></figure>'
            )
        change = pair.change(score)
        sign = "up" if change > 0 else "down" if change < 0 else "flat"
        items.append(
            f'<li data-index="{pair.index}" data-scores="{html.escape(json.dumps(pair.scores))}">'
            f'<button type="button" class="pair" aria-label="Enlarge pair {pair.index}">{"".join(sides)}</button>'
            f'<p><b class="change" data-sign="{sign}">{number(change, True)}</b> {html.escape(pair.prompt)}</p></li>'
        )
    return "\n".join(items)


def sample_grids(run: Run, most: int, title: str = "") -> list[str]:
    """Figures of the sample grids during training, at most `most`, spread evenly over the run."""
    grids = sorted(path for path in (run.folder / "images").glob("iteration_*.png") if path.stem[10:].isdigit())
    spaced = np.linspace(len(grids) - 1, 0, min(most, len(grids))).round().astype(int)
    figures = []
    for path in (grids[i] for i in sorted(set(spaced))):
        name = f"{title}iteration {int(path.stem[10:])}"
        if prompt := picture_prompt(path):
            name += f": {prompt}"
        figures.append(
            f"<figure>{image_tag(path, f'samples, {name}', size=640)}"
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
        )
    return figures
