r"""Report of training runs: PNG curves and one HTML page without other files, for finished and for running trainings.

    python -m fastvideo.eval.report --run_dir outputs/run \
        --baseline_scores outputs/base_scores.json --tuned_scores outputs/tuned_scores.json
    python -m fastvideo.eval.report --run_dir outputs/seed1 outputs/seed2 outputs/other     (compares them)

Reads args.json, metrics.jsonl, images/ and evaluation/ of each run, as far as they are there. The two files of scores
come from fastvideo.eval.eval_reward, for pictures of the base and the tuned model with the same prompts and seeds.
Without them the report pairs the first and the last evaluation of --eval_steps, or the last evaluations of the first
and the last of several runs. before_after.png shows the first pictures of both sides, unselected.

Runs that differ in nothing but seeds are one line with a band. The page needs no network. Beside it summary.json has
the page's main numbers. Where the scores have a check, right in everything, page and output begin with it.
"""

import html
import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError, check_fields, flag, flag_errors, parse_dataclass, parse_first


@dataclass
class ReportConfig:
    """Settings of a report."""

    run_dir: list[Path] = flag([], "output directory of the training run; several are compared", metavar="DIR")
    baseline_scores: str | None = flag(None, "scores JSON of the base model's pictures (fastvideo.eval.eval_reward)")
    tuned_scores: str | None = flag(None, "scores JSON of the tuned model's pictures, same prompts and seeds")
    output_dir: str | None = flag(None, "folder of the report; None: {run_dir}/report, of the first run")
    title: str | None = flag(None, "title of the page; None: the run's experiment name")
    max_gallery: int = flag(
        60, "most before/after pairs shown, spread evenly over the ranking by score change", at_least=0
    )
    serve_report: int | None = flag(
        None, "show it at this port of this machine, refreshed while the run goes on", at_least=0, below=65536
    )
    schedules: str | None = flag(None, "only draw the granular weight schedules to this image file, then exit")

    def __post_init__(self) -> None:
        if not self.run_dir and self.schedules is None:
            raise FlagError("run_dir", None, "give the output directory of a training run")
        if (self.baseline_scores is None) != (self.tuned_scores is None):
            field = "baseline_scores" if self.tuned_scores is None else "tuned_scores"
            raise FlagError(field, getattr(self, field), "give both --baseline_scores and --tuned_scores, or neither")
        if self.serve_report is not None and len(self.run_dir) != 1:
            raise FlagError("serve_report", self.serve_report, "give one --run_dir")
        if self.schedules is not None and Path(self.schedules).suffix not in (".png", ".svg", ".pdf"):
            raise FlagError("schedules", self.schedules, "name a .png, .svg or .pdf file")
        check_fields(self)


if __name__ == "__main__":  # before the slow imports: --help and a refused flag answer at once
    parse_first(ReportConfig, doc=__doc__)

from fastvideo.eval.live import LiveReport
from fastvideo.eval.plots import (
    GROUPS,
    STYLE,
    Column,
    Plot,
    column,
    compare_plots,
    describe,
    draw,
    draw_pairs,
    draw_schedules,
    inline_svg,
    plan_plots,
    save,
)
from fastvideo.eval.report_page import page, shares
from fastvideo.eval.runs import Comparison, Pair, Run, group_runs
from fastvideo.eval.statistics import RIGHT, with_error
from fastvideo.io.files import write_bytes, write_json, writing
from fastvideo.io.scores import read_signs
from fastvideo.io.words import counted

import matplotlib
import numpy as np


def summary_of(runs: list[Run], comparison: Comparison) -> dict[str, Any]:
    """The content of summary.json. None is what isn't known; seconds and iterations are for a single run only."""
    rows = comparison.rows
    check = next((row for row in rows if row["model"] in comparison.checks), {})
    (before, before_error), (after, after_error) = (check.get(side, (None, None)) for side in ("before", "after"))
    run = runs[0] if len(runs) == 1 else None
    seconds = column(run.rows, "seconds_total") if run else np.empty(0)
    found = {
        "right_before": before,
        "right_after": after,
        "right_before_error": before_error,
        "right_after_error": after_error,
        "pictures": rows[0]["n"] if rows else None,
        "seconds_of_training": float(np.nansum(seconds)) if np.isfinite(seconds).any() else None,
        "iterations": run.iterations if run else None,
        "scores": rows,
    }
    return json.loads(json.dumps(found), parse_constant=lambda _: None)  # with a single prompt errors are NaN


def score_lines(comparison: Comparison) -> list[str]:
    """The table of scores for a terminal, one line per score; for a check the two shares."""
    lines = []
    width = max((len(row["model"]) for row in comparison.rows if row["model"] not in comparison.checks), default=0)
    for row in comparison.rows:
        if not row["n"]:
            continue
        if row["model"] in comparison.checks:
            (before, before_error), (after, after_error) = shares(row)
            pictures = f"({counted(row['n'], 'picture')}, ± {before_error} and ± {after_error})"
            lines.append(f"{RIGHT}  before {before}  after {after}  {pictures}")
        else:
            before, after, change = (with_error(row[side], side == "change") for side in ("before", "after", "change"))
            lines.append(
                f"{row['model']:<{width}}  before {before}  after {after}  change {change}  ({row['n']} pairs)"
            )
    return lines


def first_pictures(comparison: Comparison, most: int = 12) -> list[Column]:
    """A fixed sample for before_after.png: the first picture, by index, of each of the first prompts."""
    firsts: dict[str, Pair] = {}
    for pair in sorted(comparison.pairs, key=lambda pair: pair.index):
        firsts.setdefault(pair.prompt, pair)
    columns = []
    for pair in list(firsts.values())[:most]:
        checks = [values for name, values in pair.scores.items() if name in comparison.checks]
        wrong = tuple(any(values[side] == 0 for values in checks) for side in (0, 1)) if checks else None
        columns.append(Column(pair.prompt, pair.images, wrong))
    return columns


def plots_of(groups: dict[str, list[Run]]) -> list[Plot]:
    """The plots of one run, or several runs compared."""
    plots = {
        name: [plan_plots(run.rows, run.settings, run.reward_names) for run in group] for name, group in groups.items()
    }
    (first, *others), *more = plots.values()
    return compare_plots(plots) if others or more else first


def write_report(
    run_dir: str | Path | Sequence[str | Path],
    baseline_scores: str | Path | None = None,
    tuned_scores: str | Path | None = None,
    output_dir: str | Path | None = None,
    title: str | None = None,
    max_gallery: int = 60,
) -> tuple[Path, Comparison]:
    """Writes report.html, summary.json, a PNG of each plot, and before_after.png where there are pairs of pictures.

    run_dir: a run's folder, or several to compare. Returns the page's path and the compared pictures. Raises FlagError
    for a run without metrics.jsonl and for scores that can't be paired.
    """
    runs = [Run.read(Path(path)) for path in ([run_dir] if isinstance(run_dir, str | Path) else run_dir)]
    groups = group_runs(runs)
    comparison = Comparison.of(runs, baseline_scores, tuned_scores)
    output_dir = Path(output_dir or runs[0].folder / "report")
    output_dir.mkdir(parents=True, exist_ok=True)
    curves: dict[str, str] = dict.fromkeys(GROUPS, "")
    with matplotlib.rc_context(STYLE):
        for plot in plots_of(groups):
            figure = draw(plot)
            save(figure, output_dir / f"{plot.name}.png")
            group = next(title for title, names in GROUPS.items() if plot.name.split("_by_")[0] in names)
            curves[group] += (
                f"<figure><h3>{plot.title}</h3>{inline_svg(figure, describe(plot), plot.name)}"
                f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
            )
        if comparison.pairs:
            draw_pairs(output_dir / "before_after.png", first_pictures(comparison), comparison.labels)
    signs = read_signs(Path(tuned_scores)) if tuned_scores else []
    text = page(groups, comparison, curves, signs, title, max_gallery)
    write_bytes(output_dir / "report.html", text.encode(errors="replace"))
    write_json(output_dir / "summary.json", summary_of(runs, comparison))
    return output_dir / "report.html", comparison


@flag_errors("report.py")
def main(argv: Sequence[str] | None = None) -> Path | None:
    """The command line; returns the path of report.html."""
    config = parse_dataclass(ReportConfig, argv, __doc__)
    if config.schedules:
        with writing("schedules", config.schedules, file=True):
            draw_schedules(config.schedules)
        return None
    if config.serve_report is not None:
        with LiveReport(config.run_dir[0], config.serve_report), suppress(KeyboardInterrupt):
            threading.Event().wait()
        return None
    output = config.output_dir or config.run_dir[0] / "report"
    scores = (config.baseline_scores, config.tuned_scores)
    with writing("output_dir", output):
        path, comparison = write_report(config.run_dir, *scores, output, config.title, config.max_gallery)
    for line in score_lines(comparison):
        print(line)
    for text in read_signs(Path(config.tuned_scores)) if config.tuned_scores else ():
        print(f"against the baseline, {text}")
    print(f"report: {path}")
    return path


if __name__ == "__main__":
    main()
