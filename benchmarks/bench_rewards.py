"""Images per second and peak memory of every reward and of the multi_reward mix; random weights, no downloads.

    python benchmarks/bench_rewards.py --device cuda --dtype bf16
    python benchmarks/bench_rewards.py --device cuda --dtype bf16 --rewards hpsv3 geneval     # these rows alone
    python benchmarks/bench_rewards.py --device cpu --narrow --images 3 --image_size 256      # a quick look anywhere

Writes each model's checkpoint at full architecture and in its real format (34 GB; --folder keeps the files for a run
with another --dtype), loads it as training does, and times `compute_reward` on the pictures of one group, from decoded
pictures to scores, with preprocessing on the CPU. Prints the median of --repeats. UnifiedReward is asked at
--unified_reward_url. Without this flag a local server answers at once, so that only the client is timed: pictures as
JPEG, requests, answers; the judge of vlm_judge always is this server. Keep the output under benchmarks/results/.
"""

import json
import platform
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

from fastvideo.cli import flag, flag_errors, parse_dataclass
from fastvideo.io.devices import DTYPES, resolve_device
from fastvideo.io.files import check_writable
from fastvideo.models.reward_model.spec import RewardSpecConfig
from fastvideo.models.reward_model.utils import build_reward_models, compute_reward

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import reward_checkpoints as checkpoints  # noqa: E402
from reward_servers import QuietHandler  # noqa: E402

# Name in the printed table -> (--reward_model, --image_reward_mode, kinds of checkpoints to write).
SETS = {
    "hpsv2": ("hpsv2", "overall", ["hps"]),
    "hpsv3": ("hpsv3", "overall", ["hpsv3"]),
    "image_reward overall": ("image_reward", "overall", ["image_reward"]),
    "image_reward granular": ("image_reward", "granular", ["granular"]),
    "clip_score": ("clip_score", "overall", ["clip_score"]),
    "pick_score": ("pick_score", "overall", ["pick_score"]),
    "multi_reward": ("multi_reward", "overall", ["hps", "image_reward", "pick_score"]),
    "unified_reward": ("unified_reward", "overall", []),
    "vlm_judge": ("vlm_judge", "overall", []),
    "pairwise": ("pairwise", "overall", []),
    "vlm_questions": ("vlm_questions", "overall", []),
    "ocr": ("ocr", "overall", []),
    "geneval": ("geneval", "overall", ["geneval"]),
    "jpeg_compressibility": ("jpeg_compressibility", "overall", []),
}


METADATA = {  # of vlm_questions and of geneval
    "questions": ["Is there a lighthouse?"],
    "include": [{"class": "boat", "count": 1, "color": "red"}],
}


@dataclass
class BenchmarkConfig:
    """Settings of the benchmark."""

    rewards: list[str] = flag(list(SETS), "rows of the table", choices=list(SETS))
    device: str = flag(resolve_device(), "where the models run")
    dtype: str = flag("bf16", "number format of the models", choices=list(DTYPES))
    images: int = flag(12, "pictures of one prompt", at_least=1)
    image_size: int = flag(720, "their width and height", at_least=1, at_most=2**14)
    repeats: int = flag(5, "timed runs, after one run that isn't timed", at_least=1)
    narrow: bool = flag(False, "quarter-width models, to try the benchmark itself")
    folder: str | None = flag(None, "keeps the checkpoints for another run (None: a temporary folder)")
    unified_reward_url: str | None = flag(None, "UnifiedReward endpoints (None: a local server that answers at once)")
    unified_reward_num_workers: int = flag(
        12, "concurrent requests to UnifiedReward in the batched measurement", at_least=1
    )


def seconds(
    config: BenchmarkConfig, models: dict, weights: dict, pictures: list[Image.Image], batch_size: int
) -> float:
    """Median time for all pictures, in seconds."""
    for model in models.values():
        model.batch_size = batch_size
        if hasattr(model, "client"):
            model.client.workers = min(batch_size, config.unified_reward_num_workers)
    prompts = ['a photograph of a lighthouse in a storm, a sign that says "NO ENTRY", dramatic light'] * len(pictures)
    times = []
    for _ in range(config.repeats + 1):
        start = time.perf_counter()
        given = {"groups": [0] * len(pictures), "metadata": [METADATA] * len(pictures)}
        rewards, *_ = compute_reward(pictures, prompts, models, weights, 1, 2, **given)
        # The rewards are on the CPU, so the device has finished.
        times.append(time.perf_counter() - start)
    assert np.isfinite(rewards).all()
    return statistics.median(times[1:])


@contextmanager
def stand_in() -> Iterator[str]:
    """The URL of a local server that gives every picture the same score at once."""
    words = [{"token": "Yes", "logprob": -0.5}, {"token": "No", "logprob": -1}]
    logprobs = {"content": [{"top_logprobs": words}]}
    choice = {"message": {"content": "Alignment Score (1-5): 3\nBetter: 1"}, "logprobs": logprobs}

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self.reply(200, json.dumps({"data": [{"id": "stand-in"}]}).encode())

        def do_POST(self) -> None:
            self.read_json()
            self.reply(200, json.dumps({"choices": [choice]}).encode())

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # with the default of 5, connections that come together wait for a second

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def peak_gib(device: str) -> float:
    """Peak memory of the GPU since its last reset, or of this process since its start on a CPU, in GiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@flag_errors("bench_rewards.py")
def main() -> None:
    config = parse_dataclass(BenchmarkConfig, doc=__doc__)
    resolve_device(config.device)
    if config.folder:
        check_writable("folder", config.folder)
    cuda = torch.device(config.device).type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(
        f"{name}; Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, open_clip {open_clip.__version__}, timm {timm.__version__}\n"
        f"{config.images} pictures of {config.image_size}x{config.image_size}, one prompt, {config.dtype}"
        f"{', quarter-width models' if config.narrow else ''}\n"
        f"{'reward':<22}{'single':>16}{'batched':>16}{'all pictures':>15}{'peak':>10}{'load':>9}"
    )
    rng = np.random.default_rng(0)
    size = (config.image_size, config.image_size)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).resize(size) for _ in range(config.images)]
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch, stand_in() as url:
        folder = Path(config.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if config.narrow:
            checkpoints.narrow_architectures(patch, folder)
        for name in config.rewards:
            reward_model, mode, needed = SETS[name]
            for kind in needed:
                if not (folder / f"{kind}.made").exists():
                    checkpoints.MAKERS[kind](folder, full=not config.narrow)
                    (folder / f"{kind}.made").touch()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            models, weights = build_reward_models(
                RewardSpecConfig(
                    reward_model=reward_model,
                    image_reward_mode=mode,
                    reward_dtype=config.dtype,
                    hps_path=str(folder / "hps_ckpt" / checkpoints.HPS_FILE),
                    clip_score_path=str(folder / checkpoints.CLIP_SCORE_FOLDER),
                    **checkpoints.hpsv3_settings(folder / checkpoints.HPSV3_FOLDER),
                    geneval_detector_path=str(folder / checkpoints.DETECTOR_FOLDER),
                    geneval_clip_path=str(folder / "image_reward_ckpt/ViT-L-14.pt"),
                    pick_score_path=str(folder / checkpoints.PICK_SCORE_FOLDER),
                    image_reward_score_dir=str(folder / "image_reward_ckpt"),
                    unified_reward_url=config.unified_reward_url or url,
                    vlm_judge_url=url,
                ),
                config.device,
            )
            loaded = time.perf_counter() - start
            single = seconds(config, models, weights, pictures, 1)
            batched = seconds(config, models, weights, pictures, config.images)
            rates, peak = (config.images / single, config.images / batched), peak_gib(config.device)
            print(
                f"{name:<22}{rates[0]:8.1f} image/s{rates[1]:8.1f} image/s{batched:13.3f} s"
                f"{peak:6.1f} GiB{loaded:7.1f} s",
                flush=True,
            )
            del models


if __name__ == "__main__":
    main()
