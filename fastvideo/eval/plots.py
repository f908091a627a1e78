"""Figures of a training run over its iterations, as PNG files and as SVG in the colours of the report's page."""

import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastvideo.eval.statistics import RIGHT, number
from fastvideo.io.files import write_bytes
from fastvideo.io.pictures import open_picture
from fastvideo.io.scores import ScoreName, score_names
from fastvideo.io.words import counted
from fastvideo.models.reward_model.granular import GranularRewardModel
from fastvideo.models.reward_model.spec import MIXES

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

# Colours of the light theme. In the page's SVGs each becomes var(--name), so that curves follow the reader's theme. The
# dark theme stands in report_template.html. Colour-blind readers can tell the series' colours apart.
INK, MUTED, GRID = "#1d232b", "#667080", "#e4e7ec"
SERIES = ("#2563c9", "#c8590c", "#0e8a70", "#8a4fd0", "#b83268", "#7a6a1f")
CSS_COLOURS = {"ink": INK, "muted": MUTED, "grid": GRID} | {f"s{i}": c for i, c in enumerate(SERIES)}
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
}
WRONG = "#c4161c"
PHASES = ("scout", "rollout", "decode", "reward", "train")


@dataclass
class Panel:
    """One axes of a figure.

    Attributes:
        series: label -> values, one per step of the plot.
        kind: line; stack, of areas; or window, whose values are lists of denoising steps.
        spread: label -> half the width of a band around the line.
        points: the values lie far apart; each gets a marker.
        limit: label and value of a dashed line.
        top: the upper end of a window's axis is at least this.
        colour: index in SERIES of the first line.
        along: label -> places of its values on the x axis, where these aren't the plot's steps.
    """

    title: str
    series: dict[str, Sequence[Any]]
    kind: str = "line"
    spread: dict[str, np.ndarray] = field(default_factory=dict)
    smooth: bool = True
    points: bool = False
    log: bool = False
    limit: tuple[str, float] | None = None
    top: float = 0
    colour: int = 0
    along: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Plot:
    """A figure of panels above each other over the iterations: {name}.png, and an SVG in the page.

    steps: [n], the x axis of every panel. runs: names of compared runs; a run has the same colour in all panels.
    costs: what training had cost at each step: name of the axis -> [n]. axis: the name of the x axis.
    """

    name: str
    title: str
    caption: str
    panels: list[Panel] = field(default_factory=list)
    steps: np.ndarray = field(default_factory=lambda: np.empty(0))
    runs: tuple[str, ...] = ()
    costs: dict[str, np.ndarray] = field(default_factory=dict)
    axis: str = "iteration"


# Titles of the page's groups of plots -> names of their plots.
GROUPS = {
    "Scores": ("right", "evaluation", "reward", "components", "granular_weights"),
    "Pictures and policy": ("scouts", "rollout_drift", "hacking", "ratio", "window"),
    "Optimisation and time": ("optimisation", "seconds"),
}


def column(rows: list[dict], key: str) -> np.ndarray:
    """Values of one key, float64 [rows]; NaN for a value that is missing or not a finite number."""
    values = [row.get(key) for row in rows]
    return np.array([float(v) if isinstance(v, int | float) and math.isfinite(v) else math.nan for v in values])


def step_numbers(rows: list[dict]) -> np.ndarray:
    """The iteration of each row, float64 [rows]."""
    return np.array([float(row.get("step", i)) for i, row in enumerate(rows, 1)])


def smoothing_width(n: int) -> int:
    """Number of iterations in a moving mean: a tenth of the run, odd."""
    return max(1, n // 10) | 1


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over `smoothing_width` values, fewer at both ends; NaNs inside are left out, others stay."""
    window, known = np.ones(smoothing_width(len(values))), np.isfinite(values)
    count = np.convolve(known, window, "same")
    total = np.convolve(np.where(known, values, 0.0), window, "same")
    inside = np.logical_or.accumulate(known) & np.logical_or.accumulate(known[::-1])[::-1]
    return np.divide(total, count, out=np.full(len(values), math.nan), where=inside & (count > 0))


def first_last(values: np.ndarray) -> tuple[float, float, int]:
    """(mean of the first k known values, mean of the last k, k), where k is a tenth of the run."""
    known = values[np.isfinite(values)]
    k = max(1, len(known) // 10)
    return (known[:k].mean(), known[-k:].mean(), k) if len(known) else (math.nan, math.nan, 0)


def granular_weights(rows: list[dict]) -> dict[str, np.ndarray]:
    """Component -> its weight in the reward, in each row."""
    names = [k for k in dict.fromkeys(k for row in rows for k in row) if k.startswith("granular_weight_")]
    weights = {k.removeprefix("granular_weight_"): column(rows, k) for k in names}
    return {name: values for name, values in weights.items() if np.isfinite(values).any()}


def weights_moved(rows: list[dict]) -> bool:
    """Whether weights of the reward's components changed. Then rewards of different iterations can't be compared."""
    return any(np.nanmax(values) - np.nanmin(values) > 1e-9 for values in granular_weights(rows).values())


def evaluation_measure(settings: dict) -> str:
    """The name of the reward that decides a run's best checkpoint."""
    return str(settings.get("eval_reward") or settings.get("reward_model") or "–")


def is_sum(measure: str) -> bool:
    """Whether a reward named so is the weighted sum of several rewards' raw scores, and so on no reward's scale."""
    return "," in measure or measure in MIXES


def scores_in(rows: list[dict], prefix: str, schema: Mapping[str, Any]) -> dict[str, ScoreName]:
    """The scores whose means are in the metrics as {prefix}{name}: name -> meaning, see `score_names`."""
    names = dict.fromkeys(key.removeprefix(prefix) for row in rows for key in row if key.startswith(prefix))
    return score_names([name for name in names if name != "std"], schema)  # reward_std is no score's


def plan_plots(rows: list[dict], settings: dict, schema: Mapping[str, Any] | None = None) -> list[Plot]:
    """The plots for which the run has numbers.

    rows: metrics.jsonl. settings: args.json. schema: see `reward_schema`; None: guessed from the names of the scores.
    """
    every = rows
    evaluated = [row for row in rows if "evaluation_reward" in row]
    rows = [row for row in rows if row.get("step") != 0]  # 0: the evaluation before training
    steps = step_numbers(rows)

    def some(*keys: str, rows: list[dict] = rows) -> dict[str, np.ndarray]:
        return {k: v for k in keys if np.isfinite(v := column(rows, k)).any()}

    trained = scores_in(rows, "reward_", schema or {})
    of_training = some(*(f"reward_{name}" for name, known in trained.items() if known.kind == "check"), rows=every)
    prefix = "evaluation_reward"
    judged = scores_in(every, f"{prefix}_", schema or {})
    of_evaluation = some(*(f"{prefix}_{name}" for name, known in judged.items() if known.kind == "check"), rows=every)
    measure = evaluation_measure(settings)
    decides = "a weighted sum of raw scores" if is_sum(measure) else measure
    titles = {prefix: f"what decides the best checkpoint: {decides}"}
    titles |= {f"{prefix}_{name}": name for name, known in judged.items() if known.kind != "check"}
    measured = [
        Panel(title, {key: values}, smooth=False, points=True, colour=i)
        for i, (key, title) in enumerate(titles.items())
        if np.isfinite(values := column(evaluated, key)).any()
    ]
    error = column(rows, "reward_std") / np.sqrt(column(rows, "images"))

    models = dict.fromkeys(known.model for known in trained.values() if known.kind != "check")
    rewards = []
    for model in models:
        rewards += [Panel(model, some(f"reward_{model}"))] * (len(models) > 1)
        parts = [name for name, known in trained.items() if known.model == model and known.kind == "component"]
        for i, name in enumerate(parts):
            title = trained[name].part + (f" ({model})" if len(models) > 1 else "")
            rewards.append(Panel(title, some(f"reward_{name}"), colour=i))
    looks = some(*dict.fromkeys(k for row in rows for k in row if k.startswith("hacking_"))).items()
    phases = {k.removeprefix("seconds_"): v for k, v in some(*(f"seconds_{p}" for p in PHASES)).items()}
    windows = [w if isinstance(w := row.get("window"), list) else [] for row in rows]
    clip = settings.get("clip_range")
    clip = ("clip range", float(clip)) if isinstance(clip, int | float) and clip > 0 else None
    deviation = some("ratio_max_deviation")
    log = any(np.nanmax(v) > 0 for v in deviation.values())

    sides = {"clip_high": "above", "clip_low": "below"}
    sides = {sides[k]: v for k, v in some(*sides).items()}
    width = smoothing_width(len(rows))
    mean = f" Thin: each iteration; thick: mean over {width} iterations." if width > 1 else ""
    planned = settings.get("sampling_steps")
    plots = [
        Plot("right", RIGHT.capitalize(), "Share of pictures that are right in everything; nothing trains on it.",
             [Panel("training pictures", of_training),
              Panel("evaluation", of_evaluation, smooth=False, points=True, colour=1)]),
        Plot("evaluation", "Evaluation", "Fixed prompts with fixed seeds, sampled without noise.",
             measured),
        Plot("reward", "Reward", "Weighted total on the training prompts." + mean
             + " Band: standard error over the pictures of all processes.",
             [Panel("weighted total", some("reward"), spread={"reward": error}),
              Panel("standard deviation", some("reward_std"), colour=3)]),
        Plot("scouts", "Scouting", "All candidates of the training prompts, sampled in few steps; and, of those that "
             "are trained, how well their rewards rank the full samples (Spearman's ρ)." + mean,
             [Panel("reward of the candidates", some("scout_reward")),
              Panel("rank correlation", some("scout_rank_correlation"), colour=1)]),
        Plot("rollout_drift", "What FP8 changes", "One prompt's group, sampled with and without FP8: difference of the "
             "latents, and of a picture's reward in standard deviations of its group.",
             [Panel("latents", some("rollout_drift_latents"), smooth=False, points=True),
              Panel("reward", some("rollout_drift_reward"), smooth=False, points=True, colour=1)]),
        Plot("components", "What the reward is made of", "Each on its own scale, unweighted.", rewards),
        Plot("hacking", "Signs of reward hacking", "What the training pictures look like. Glaring colours, hard edges, "
             "fine texture and one picture again and again please a reward, not people." + mean,
             [Panel(k.removeprefix("hacking_").replace("_", " "), {k: v}, colour=i) for i, (k, v) in enumerate(looks)]),
        Plot("granular_weights", "Granular weights", "Weight of each component in the reward; they sum to 1.",
             [Panel("weight", granular_weights(rows), smooth=False)]),
        Plot("ratio", "Policy ratio and clipping", "How far new and old policy differ, and the share of terms beyond "
             "each side of the clip range. If means of log r lie below 0, only the lower side acts: see --ratio_norm.",
             [Panel("max |ratio − 1|", deviation, log=log, limit=clip if log else None),
              Panel("mean ratio − 1", {k: v - 1 for k, v in some("ratio_mean").items()}, colour=4),
              Panel("share clipped", sides or some("clip_frac"), colour=1),
              Panel("mean of log r", over_steps(rows, "log_ratio_mean"), colour=2),
              Panel("standard deviation of log r", over_steps(rows, "log_ratio_std"), colour=2)]),
        Plot("optimisation", "Optimisation", "Loss, gradient norm before clipping, learning rate.",
             [Panel("loss", some("loss")), Panel("gradient norm", some("grad_norm"), colour=2),
              Panel("learning rate", some("lr"), smooth=False, colour=3)]),
        Plot("window", "Trained denoising steps", "Step 0 is pure noise; the filled steps are stochastic and trained.",
             [Panel("denoising step", {"window": windows} if any(windows) else {}, kind="window",
                    top=planned if isinstance(planned, int) else 0)]),
        Plot("seconds", "Time per iteration", "Wall-clock seconds per iteration, by phase.",
             [Panel("seconds", phases, kind="stack"),
              Panel("evaluation", some("seconds_evaluation"), smooth=False, points=True, colour=4)]),
    ]  # fmt: skip
    for plot in plots:
        plot.steps = {"evaluation": step_numbers(evaluated), "right": step_numbers(every)}.get(plot.name, steps)
        plot.panels = [panel for panel in plot.panels if panel.series]
        costs = {"pictures sampled": "images", "seconds of training, without evaluations": "seconds_total"}
        sums = {axis: np.append(0, np.nancumsum(column(rows, key))) for axis, key in costs.items()}
        done = np.searchsorted(steps, plot.steps, side="right")
        plot.costs = {axis: values[done] for axis, values in sums.items() if values[-1]}
    return [plot for plot in plots if plot.panels]


def over_steps(rows: list[dict], measure: str) -> dict[str, np.ndarray]:
    """The highest and the lowest of a measure's values over the trained steps, per iteration. Empty: it isn't there."""
    values = [[v for k, v in row.items() if k.startswith(f"{measure}/step_")] for row in rows]
    if not any(values):
        return {}
    ends = {"highest step": max, "lowest step": min}
    return {name: np.array([end(found, default=math.nan) for found in values], float) for name, end in ends.items()}


def compare_plots(groups: dict[str, list[list[Plot]]]) -> list[Plot]:
    """Merges the plots of several runs: one line per group, the mean of its runs, with their standard deviation as a
    band.

    groups: name -> the plots of each run. The runs of a group differ in nothing but seeds.
    """
    plots = [plot for runs in groups.values() for run in runs for plot in run]
    names = dict.fromkeys(plot.name for plot in plots)
    compared = [_compared([plot for plot in plots if plot.name == name], groups) for name in names]
    main = "evaluation" if "evaluation" in names else "reward"
    return [part for plot in compared for part in (plot, *(_along_costs(plot, groups) if plot.name == main else ()))]


def _along_costs(compared: Plot, groups: dict[str, list[list[Plot]]]) -> list[Plot]:
    """The same lines over pictures and over seconds instead of iterations, which cost each run something else."""
    found = []
    plots = {
        name: [plot for run in runs for plot in run if plot.name == compared.name] for name, runs in groups.items()
    }
    for axis in dict.fromkeys(axis for group in plots.values() for plot in group for axis in plot.costs):
        along: dict[str, np.ndarray] = {}
        for name, group in plots.items():
            costs = [np.full(len(compared.steps), math.nan) for _ in group]
            for cost, plot in zip(costs, group, strict=True):
                if axis in plot.costs:
                    cost[np.searchsorted(compared.steps, plot.steps)] = plot.costs[axis]
            along[name] = np.ma.masked_invalid(costs).mean(0).filled(math.nan) if costs else np.empty(0)
        panels = [
            replace(panel, along={name: along[name] for name in panel.series})
            for panel in compared.panels[:1]  # what decides which run is better
            if all(np.isfinite(along[name]).any() for name in panel.series)
        ]
        what = axis.split()[0]
        new = replace(compared, name=f"{compared.name}_by_{what}", title=f"{compared.title} by {what}", axis=axis)
        caption = "The same as above, at equal cost instead of after equally many iterations."
        found += [replace(new, caption=caption, panels=panels)] if panels else []
    return found


def _compared(plots: list[Plot], groups: dict[str, list[list[Plot]]]) -> Plot:
    steps = np.unique(np.concatenate([plot.steps for plot in plots]))
    found: dict[str, Panel] = {}
    for i, (group, runs) in enumerate(groups.items()):
        values: dict[str, list[np.ndarray]] = {}
        for plot in (plot for run in runs for plot in run if plot.name == plots[0].name):
            places = np.searchsorted(steps, plot.steps)
            for panel in plot.panels:
                if panel.kind == "window":  # windows have no mean: the first run's are shown
                    windows = [[]] * len(steps)
                    for place, window in zip(places, panel.series["window"], strict=True):
                        windows[place] = window
                    found.setdefault(group, replace(panel, title=group, series={"window": windows}, colour=i))
                    continue
                for label, series in panel.series.items():
                    title = panel.title if len(panel.series) == 1 else label
                    line = replace(panel, title=title, series={}, spread={}, kind="line", colour=0, limit=None)
                    found.setdefault(title, line)
                    values.setdefault(title, []).append(np.full(len(steps), math.nan))
                    values[title][-1][places] = series
        for title, lines in values.items():
            known = np.ma.masked_invalid(lines)
            found[title].series[group] = known.mean(0).filled(math.nan)
            if len(lines) > 1:
                found[title].spread[group] = known.std(0, ddof=1).filled(math.nan)
    seeds = max(map(len, groups.values()))
    caption = plots[0].caption.split(" Band:")[0] + (" Bands: standard deviation over seeds." if seeds > 1 else "")
    return replace(plots[0], caption=caption, steps=steps, panels=list(found.values()), runs=tuple(groups))


def draw(plot: Plot) -> Figure:
    """The figure of a plot."""
    n, steps, names = len(plot.panels), plot.steps, [run[:60] for run in plot.runs]
    height = (2.7 if n == 1 else 0.6 + 1.35 * n) + 0.2 * len(names)
    figure = Figure(figsize=(4.7, height), layout="constrained")
    edges = np.append(steps - 0.5, steps[-1] + 0.5)
    if names and plot.panels[0].kind == "line":
        lines = [Line2D([], [], lw=1.8, **line_style(i)) for i in range(len(names))]
        figure.legend(lines, names, loc="outside upper left", handlelength=1.6)
    for ax, panel in zip(figure.subplots(n, sharex=True, squeeze=False)[:, 0], plot.panels, strict=True):
        ax.set_title(panel.title)
        ax.yaxis.set_major_locator(MaxNLocator(5 if n == 1 else 3))
        ax.ticklabel_format(axis="y", useOffset=False)
        if panel.kind == "stack":
            areas = [np.append(v, v[-1]) for v in map(np.nan_to_num, panel.series.values())]
            ax.stackplot(edges, areas, step="post", labels=list(panel.series), colors=SERIES, alpha=0.85, lw=0)
            ax.set_ylim(bottom=0)
        elif panel.kind == "window":
            draw_windows(ax, edges, panel)
        else:
            draw_lines(ax, steps, panel, plot.runs)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(
                loc="lower right",
                bbox_to_anchor=(1.01, 0.97),
                ncols=4,
                handlelength=1.2,
                handletextpad=0.5,
                columnspacing=1.1,
                borderpad=0.2,
            )
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        ax.grid(axis="x", visible=False)
        ax.set_xlim(edges[0], edges[-1])
        if panel.along:
            ax.set_xlim(0, max(np.nanmax(places) for places in panel.along.values()) * 1.02)
    ax.set_xlabel(plot.axis)
    return figure


def line_style(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th line: the colours of SERIES, then the same colours dashed."""
    return {"color": SERIES[i % len(SERIES)], "ls": ("-", (0, (4, 1.5)), ":")[i // len(SERIES) % 3]}


def draw_lines(ax: Axes, steps: np.ndarray, panel: Panel, runs: Sequence[str] = ()) -> None:
    """Draws a panel of lines, with bands, markers and the limit. runs: see `Plot`."""
    for i, (name, values) in enumerate(panel.series.items()):
        style = line_style(runs.index(name) if runs else panel.colour + i)
        label = name if len(panel.series) > 1 and not runs else None
        known, places = np.isfinite(values), panel.along.get(name, steps)
        line = smoothed(values) if panel.smooth else values
        if name in panel.spread:
            band = smoothed(panel.spread[name]) if panel.smooth else panel.spread[name]
            ax.fill_between(places, line - band, line + band, color=style["color"], alpha=0.18, lw=0)
        if panel.smooth and not runs:
            ax.plot(places, values, color=style["color"], alpha=0.35, lw=0.9)
        marker = "o" if panel.points or known.sum() == 1 else None
        if panel.points:
            ax.plot(places[known], line[known], lw=1.8, label=label, marker=marker, ms=4, **style)
        else:
            ax.plot(places, line, lw=1.8, label=label, marker=marker, **style)
    if panel.log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=5))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e−")))
        ax.yaxis.set_minor_locator(NullLocator())
    if panel.limit:
        ax.axhline(panel.limit[1], color=MUTED, lw=1, ls=(0, (4, 3)), label=panel.limit[0])


def draw_windows(ax: Axes, edges: np.ndarray, panel: Panel) -> None:
    """Draws a filled cell for each trained step of each iteration. Equal neighbours become one rectangle."""
    start, windows, colour = 0, panel.series["window"], SERIES[panel.colour % len(SERIES)]
    for i in range(1, len(windows) + 1):
        if i < len(windows) and windows[i] == windows[start]:
            continue
        span = [(edges[start], edges[i] - edges[start])]
        for step in windows[start]:
            ax.broken_barh(span, (step - 0.5, 1), facecolor=colour, edgecolor=colour, lw=0.3)
        start = i
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_ylim(-0.5, max(max(max(w, default=0) for w in windows) + 1, panel.top) - 0.5)


def describe(plot: Plot) -> str:
    """The plot as a sentence, for readers who can't see curves."""
    parts = []
    for panel in plot.panels:
        for label, values in panel.series.items():
            if panel.kind == "window":
                seen = [w for w in values if w]
                who = f"{panel.title}: " if plot.runs else ""
                parts.append(f"{who}trained steps {seen[0]} at first, {seen[-1]} at last")
            else:
                first, last, _ = first_last(values)
                name = f"{panel.title} of {label}" if plot.runs else label if len(panel.series) > 1 else panel.title
                parts.append(f"{name} from {number(first)} to {number(last)}")
    over = "the iterations" if plot.axis == "iteration" else plot.axis
    return f"{plot.title} over {over}: " + "; ".join(parts)


def save(figure: Figure, path: str | Path, dpi: int = 200) -> None:
    """Writes a figure atomically, in the format of the path's suffix, such as .png, .svg or .pdf."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format=Path(path).suffix[1:])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(path), buffer.getvalue())


def inline_svg(figure: Figure, alt: str, name: str) -> str:
    """The figure as SVG for the page: colours are CSS variables, ids are unique in the page, nothing is loaded."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    opening = re.search(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', svg)
    svg = f'<svg {opening[1]} role="img" aria-label="{html.escape(alt)}">{svg[opening.end() :]}'
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for css, colour in CSS_COLOURS.items():
        svg = svg.replace(colour, f"var(--{css})")
    return svg


def read_picture(path: Path) -> Image.Image | None:
    """The picture in RGB; None where no picture can be read."""
    try:
        return open_picture(path)
    except (FileNotFoundError, ValueError):
        return None


def picture_prompt(path: Path) -> str:
    """The prompt in a picture's file; empty without one."""
    image = read_picture(path)
    return str(image.info.get("prompt", "")) if image else ""


@dataclass
class Column:
    """A prompt's pictures before and after. wrong: whether each isn't right in everything; None: there is no check."""

    prompt: str
    images: tuple[Path, Path]
    wrong: tuple[bool, bool] | None = None


def draw_pairs(path: Path, columns: Sequence[Column], labels: tuple[str, str], across: int = 6) -> None:
    """Writes a PNG of the pictures in the columns' order, `across` per row: before above, after below, then the prompt.

    Wrong pictures have a frame and a cross. A picture that can't be read leaves a blank cell.
    """
    side, gap, left, top, line = 192, 16, 44, 52, 19  # pixels; 192 is a multiple of 32 and 64
    pitch = side + gap
    captions = [_caption(column.prompt) for column in columns]
    rows = range(0, len(columns), across)
    heights = [2 * pitch + line * max(len(text) for text in captions[start : start + across]) + 22 for start in rows]
    width, height = left + across * pitch, top + sum(heights)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    ax.axis("off")

    ax.text(
        left,
        24,
        f"The first picture of each of the first {counted(len(columns), 'prompt')}, not selected",
        va="center",
        fontsize=12,
    )
    if any(column.wrong is not None for column in columns):
        legend = ax.text(width - gap, 24, f"marked: not {RIGHT}", va="center", ha="right", fontsize=12)
        start = legend.get_window_extent(FigureCanvasAgg(figure).get_renderer()).x0
        _mark(ax, start - 34, 12, 24, 24)
    for start, above in zip(rows, top + np.cumsum([0, *heights[:-1]]), strict=True):
        for i, label in enumerate(labels):
            middle = above + i * pitch + side / 2
            ax.text(left / 2 - 2, middle, _text(label)[:22], va="center", ha="center", rotation=90, fontsize=12)
        for place, column in enumerate(columns[start : start + across]):
            x = left + place * pitch
            for i, image in enumerate(map(read_picture, column.images)):
                _draw_cell(ax, image, x, above + i * pitch, side, bool(column.wrong and column.wrong[i]))
            text = "\n".join(captions[start + place])
            ax.text(x, above + 2 * pitch - 4, text, va="top", fontsize=11.5, linespacing=1.2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        save(figure, path, dpi=100)


def _text(text: str) -> str:
    """The text without characters that no font can draw."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _caption(prompt: str) -> list[str]:
    """The lines under a picture, at most four."""
    return textwrap.wrap(_text(prompt), 22, max_lines=4, placeholder=" …")


def _draw_cell(ax: Axes, image: Image.Image | None, x: float, y: float, side: int, wrong: bool) -> None:
    """Draws a picture, or a blank cell, into the square at (x, y) with this side."""
    if image is None:
        ax.add_patch(Rectangle((x, y), side, side, facecolor="none", edgecolor=GRID, lw=0.8, ls=(0, (4, 3))))
        ax.text(x + side / 2, y + side / 2, "no picture", va="center", ha="center", color=MUTED, fontsize=10.5)
        return
    pixels = max(image.size) <= side / 2  # a small picture keeps its pixels visible
    scale = side / max(image.size)
    wide, high = (max(1, round(length * scale)) for length in image.size)
    image = image.resize((wide, high), Image.Resampling.NEAREST if pixels else Image.Resampling.LANCZOS)
    x, y = x + (side - wide) // 2, y + (side - high) // 2
    ax.imshow(image, extent=(x, x + wide, y + high, y), aspect="auto", interpolation="nearest")
    if wrong:
        _mark(ax, x, y, wide, high)
    else:
        ax.add_patch(Rectangle((x, y), wide, high, facecolor="none", edgecolor=GRID, lw=0.8))


def _mark(ax: Axes, x: float, y: float, wide: float, high: float) -> None:
    """Draws a frame around a picture, and a cross in its corner for readers who don't see red."""
    badge = 24
    frame = {"facecolor": "none", "edgecolor": WRONG, "lw": 4.4}  # 6 pixels, one of them on the picture
    ax.add_patch(Rectangle((x - 2, y - 2), wide + 4, high + 4, **frame))
    corner = x + wide - badge
    ax.add_patch(Rectangle((corner, y), badge, badge, facecolor=WRONG, edgecolor="white", lw=1.2))
    for ends in ((6, badge - 6), (badge - 6, 6)):
        ax.plot([corner + 6, corner + badge - 6], [y + end for end in ends], color="white", lw=2.4)


def draw_schedules(path: str | Path) -> None:
    """Draws the granular schedules for the docs: how far a weight has moved from start to end, by training progress."""

    class Moved(GranularRewardModel):
        component_names = ("start", "end")  # weights (1, 0) -> (0, 1): the second weight is the share of the way

        def score_components(self, images: list, prompts: list[str]) -> dict:
            return {}  # nothing is scored here

    progress = np.linspace(0, 1, 1001)
    lines = [("linear", None), ("cosine", None)] + [(s, g) for s in ("exponential", "logarithmic") for g in (0.5, 2.0)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        ax = figure.subplots()
        for i, (schedule, gamma) in enumerate(lines):
            share = Moved((1, 0), (0, 1), schedule, gamma).get_dynamic_weights(progress, 1.0)[:, 1]
            label = schedule if gamma is None else f"{schedule}, γ = {gamma:g}"
            ax.plot(progress, share, label=label, color=SERIES[i], lw=1.8)
        ax.set(title="share of the way from start to end weight", xlabel="progress  p = step / total steps")
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, path)
