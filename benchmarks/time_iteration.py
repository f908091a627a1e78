"""Times the real trainer by phase on FLUX blocks of full width with random weights; needs no downloads.

    python benchmarks/time_iteration.py --double_blocks 4 --single_blocks 8 -- --train_micro_batch_size 3

Flags behind `--` go to the trainer. The defaults are the MixGRPO recipe (720×720, G 12, T 25, window 4, k 3, one
prompt) with windows at 0, 10 and 20, a reward that costs next to nothing, and two iterations a window, of which the
second is reported. Prints a table and the versions; keep the output under benchmarks/results/.
"""

import json
import platform
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fastvideo.config import GRPOConfig, flag, parse_dataclass
from fastvideo.dataset.latent_flux_rl_datasets import FOLDERS
from fastvideo.train_grpo_flux import set_up
from fastvideo.utils.grpo_states import windows

import diffusers
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel


@dataclass
class BenchmarkConfig:
    """What to time."""

    double_blocks: int = flag(4, "double-stream blocks (FLUX.1 has 19)")
    single_blocks: int = flag(8, "single-stream blocks (FLUX.1 has 38)")
    folder: str | None = flag(None, "where the random model goes (None: a temporary folder)")


# FLUX.1-dev's published configuration.
TRANSFORMER = {"attention_head_dim": 128, "num_attention_heads": 24, "guidance_embeds": True}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def make_inputs(folder: Path, config: BenchmarkConfig) -> int:
    """Random transformer, VAE and one prompt's embeddings under `folder`. Returns the transformer's parameters."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformer = FluxTransformer2DModel(
            num_layers=config.double_blocks, num_single_layers=config.single_blocks, **TRANSFORMER
        )
        AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="50GB")
    shapes = {"prompt_embed": (512, 4096), "pooled_prompt_embeds": (768,), "text_ids": (512, 3)}
    for name, shape in shapes.items():
        (folder / name).mkdir(exist_ok=True)
        torch.save(torch.zeros(shape) if name == "text_ids" else torch.randn(shape), folder / name / "0.pt")
    (folder / "prompt.json").write_text(json.dumps([dict.fromkeys(FOLDERS, "0.pt") | {"caption": "a benchmark"}]))
    return transformer.num_parameters()


def main() -> None:
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    config = parse_dataclass(BenchmarkConfig, argv[:split], __doc__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        parameters = make_inputs(folder, config)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        print(
            f"{gpu}; Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
        )
        print(f"{parameters / 1e9:.2f} B parameters; trainer flags: {' '.join(argv[split + 1 :])}")
        training = parse_dataclass(
            GRPOConfig,
            f"--pretrained_model_name_or_path {folder} --data_json_path {folder}/prompt.json --output_dir {folder}/out "
            "--reward_model jpeg_compressibility --dataloader_num_workers 0 "
            "--max_train_steps 6 --iters_per_group 2 --prog_overlap_step 10".split()
            + argv[split + 1 :],
        )
        trainer, _, loader = set_up(training)
        schedule = islice(windows(training), training.max_train_steps)
        lines = [trainer.iteration(batch, window)[0] for window, batch in zip(schedule, loader, strict=False)]
    phases = ["rollout", "decode", "reward", "train", "total"]
    print("window  " + "".join(f"{phase:>9}" for phase in phases) + "      NFE  first ratio deviation")
    for line in lines[1::2]:
        seconds = "".join(f"{line[f'seconds_{phase}']:9.2f}" for phase in phases)
        first, last = line["window"][0], line["window"][-1]
        print(f"{first:2d}-{last:<5d}{seconds}{line['nfe']:9d}  {line['ratio_first_deviation']:.2e}")
    if torch.cuda.is_available():
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
