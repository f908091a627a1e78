"""What the comparisons on a tiny FLUX share: runs in worker processes, each measured on the withheld scenes.

A run trains through the command line of train_grpo_flux.py. Then some of its checkpoints draw all withheld scenes of
data/tiny_prompts_test.txt, twice and with the same noise as the base model, and some scenes of the training prompts.
"""

import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]  # make_tiny_flux; custom_rewards

from fastvideo import train_grpo_flux  # noqa: E402
from fastvideo.eval.hacking import diversity  # noqa: E402
from fastvideo.io.files import check_writable  # noqa: E402
from fastvideo.models.pretrained import family_of  # noqa: E402
from fastvideo.sample.sample_flux import load_tuned  # noqa: E402
from fastvideo.utils.grpo_states import windows  # noqa: E402
from fastvideo.utils.picture_measures import appearances  # noqa: E402

import diffusers  # noqa: E402
import make_tiny_flux  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from PIL import Image  # noqa: E402

MODEL, PROMPTS, TEST_PROMPTS = (
    ROOT / "data" / name for name in ("tiny_flux", "tiny_prompts.txt", "tiny_prompts_test.txt")
)
REPEATS = 2  # pictures of each withheld scene
NOISE_SEED = 42
# The tiny FLUX's settings in all comparisons; the rest is the trainer's and each algorithm's own. Rows a pass change
# speed only: a GPU is fastest with all of them, a CPU with as many as its caches hold.
ROWS = (
    "--train_micro_batch_size 648 --rollout_batch_size 288"
    if torch.cuda.is_available()
    else "--train_micro_batch_size 72"
)
COMMON = (
    "--h 32 --w 32 --sampling_steps 10 --mixed_precision no --no_gradient_checkpointing --compile false --no_use_wandb "
    f"--dataloader_num_workers 0 --image_log_steps 0 --reward_model shapes --lr_scheduler cosine {ROWS}"
).split()


@dataclass(frozen=True)
class Run:
    """One training.

    flags: besides COMMON. measure_every: iterations between the measured checkpoints; the last one is always measured.
    frozen_at: first step of a window that stays there; the trainer's own frozen window is at 0. keep_pictures: of the
    last checkpoint, in {name}.npy. model: the base model; all runs of a comparison have the same.
    """

    name: str
    flags: tuple[str, ...]
    iterations: int
    measure_every: int
    frozen_at: int | None = None
    keep_pictures: bool = False
    model: Path = MODEL

    @property
    def guidance_scale(self) -> float | None:
        """With which the run samples and is measured. None: the model family's."""
        return float(self.flags[self.flags.index("--guidance_scale") + 1]) if "--guidance_scale" in self.flags else None


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def draw(
    pipe: diffusers.DiffusionPipeline, prompts: Sequence[str], repeats: int, guidance_scale: float | None = None
) -> np.ndarray:
    """uint8 [repeats · prompts, 32, 32, 3]. guidance_scale: None is the family's."""
    images = make_tiny_flux.sample(pipe, list(prompts) * repeats, NOISE_SEED, guidance_scale=guidance_scale)
    return np.stack([np.asarray(image) for image in images])


def measure(pictures: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """Means of the reward's parts, the share right in everything with its standard error, and signs of hacking.

    The error is clustered by prompt: pictures of one scene are not independent.
    """
    repeats = len(pictures) // len(prompts)
    images = [Image.fromarray(picture) for picture in pictures]
    scores = make_tiny_flux.check(images, list(prompts) * repeats)
    found = {name: float(values.mean()) for name, values in scores.items()}
    per_prompt = scores["right"].reshape(repeats, -1).mean(0)
    found["right_error"] = float(per_prompt.std(ddof=1) / math.sqrt(len(per_prompt)))
    found |= {name: float(values.mean()) for name, values in appearances(images).items()}
    if repeats > 1:
        groups = [images[place :: len(prompts)] for place in range(len(prompts))]
        found["diversity_pixels"] = float(np.mean([diversity(group, None)["diversity_pixels"] for group in groups]))
    return found


def train_and_measure(run: Run, output: Path) -> dict:
    """A finished run's settings, its points (one a measured checkpoint) and its curve of training rewards.

    A run that is in `output` already is read from there.
    """
    result = output / f"{run.name}.json"
    if result.exists():
        return json.loads(result.read_text())
    folder = output / run.name
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted comparison left
    given = ["--pretrained_model_name_or_path", run.model, "--data_json_path", output / "embeddings/prompt.json"]
    given += ["--output_dir", folder, "--max_train_steps", run.iterations, "--checkpointing_steps", run.measure_every]
    AcceleratorState._reset_state(reset_partial_state=True)  # of the worker's run before this one
    GradientState._reset_state()
    train_grpo_flux.windows = windows
    if run.frozen_at is not None:
        train_grpo_flux.windows = lambda config: itertools.repeat(
            [*range(run.frozen_at, run.frozen_at + config.group_size)]
        )
    train_grpo_flux.main([*COMMON, *run.flags, *map(str, given)])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    pipe = base_pipeline(run.model)
    points = []
    for done in sorted({*range(run.measure_every, run.iterations, run.measure_every), run.iterations}):
        (checkpoint,) = folder.glob(f"checkpoint-{done}-*")
        pipe.transformer = load_tuned(str(run.model), str(checkpoint), torch.float32).to(pipe.device)
        pictures = draw(pipe, lines(TEST_PROMPTS), REPEATS, run.guidance_scale)
        spent = {
            name: sum(row[name] for row in rows[:done])
            for name in ("images", "nfe", "seconds_total", "optimizer_steps")
        }
        points.append({"iteration": done, **measure(pictures, lines(TEST_PROMPTS)), **spent})
    if run.keep_pictures:
        np.save(output / f"{run.name}.npy", pictures)
    training = measure(draw(pipe, lines(PROMPTS), 1, run.guidance_scale), lines(PROMPTS))
    keep = ("step", "reward", "clip_frac", "ratio_mean", "grad_norm", "window")
    prefixes = ("reward_", "hacking_", "scout_")
    curve = [{k: v for k, v in row.items() if k in keep or k.startswith(prefixes)} for row in rows]
    found = {"name": run.name, "flags": run.flags, "points": points, "training": training, "curve": curve}
    shutil.rmtree(folder)  # checkpoints of hundreds of runs
    result.write_text(json.dumps(found))
    return found


def base_pipeline(model: Path) -> diffusers.DiffusionPipeline:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return family_of(str(model)).pipelines[0].from_pretrained(model, dtype=torch.float32).to(device)


def _begin(gpus: int, threads: int, counter: "multiprocessing.sharedctypes.Synchronized") -> None:
    """Gives a worker its GPU and threads."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    torch.set_num_threads(threads)
    os.environ |= {"TQDM_MININTERVAL": "30", "HF_HUB_OFFLINE": "1"}


def _work(run: Run, output: Path) -> dict:
    log = os.open(output / f"{run.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        return train_and_measure(run, output)
    except BaseException as error:
        traceback.print_exc()
        raise RuntimeError(f"{run.name} failed: {error!r}; see {output / run.name}.log") from None


def run_all(runs: Sequence[Run], output: Path, jobs: int) -> dict[str, dict]:
    """{name: result} of the runs, `jobs` of them at a time, spread over the GPUs if there are any."""
    output.mkdir(parents=True, exist_ok=True)
    embed = [
        "--model_path",
        str(runs[0].model),
        "--prompt_dir",
        str(PROMPTS),
        "--output_dir",
        str(output / "embeddings"),
    ]
    command = [sys.executable, "-m", "fastvideo.data_preprocess.preprocess_flux_embedding", *embed]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path})
    context = multiprocessing.get_context("spawn")
    gpus, threads = torch.cuda.device_count(), max(1, (os.cpu_count() or 1) // jobs)
    begin = (gpus, threads, context.Value("i", 0))
    with ProcessPoolExecutor(jobs, context, _begin, begin) as pool:
        found = pool.map(_work, runs, itertools.repeat(output))
        return {run.name: result for run, result in zip(runs, found, strict=True)}


def base(output: Path, model: Path = MODEL, guidance_scale: float | None = None) -> dict[str, float]:
    """The base model's measures on the withheld scenes; its pictures are kept as base.npy. See `draw`.

    Raises FlagError if the comparison's --output_dir can't be written.
    """
    check_writable("output_dir", output)
    pictures = draw(base_pipeline(model), lines(TEST_PROMPTS), REPEATS, guidance_scale)
    output.mkdir(parents=True, exist_ok=True)
    np.save(output / "base.npy", pictures)
    return measure(pictures, lines(TEST_PROMPTS))


def machine() -> str:
    """What the numbers were measured on."""
    gpus = torch.cuda.device_count()
    where = f"{gpus} × {torch.cuda.get_device_name(0)}" if gpus else f"{os.cpu_count()} cores, {platform.machine()}"
    return f"{where}, torch {torch.__version__}, diffusers {diffusers.__version__}"
