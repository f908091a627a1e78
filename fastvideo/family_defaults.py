"""Values of settings that depend on the base model's family, where the user gives none. models/family.py has the rest
of what differs between families; this module imports nothing slow."""

import math
from collections.abc import Mapping
from typing import Any

from fastvideo.io.model_index import model_index

FLUX_2_KLEIN = "Flux2KleinPipeline"


def flux_2_shift(height: int, width: int, sampling_steps: int) -> float:
    """e^μ, the shift of FLUX.2's schedule for pictures of height × width pixels in `sampling_steps` steps.

    μ is linear in the number of tokens at 10 and at 200 steps, and between these in the number of steps; above 4,300
    tokens it is that of 200 steps. Numbers of Black Forest Labs, as in diffusers' `compute_empirical_mu`.
    """
    tokens = height * width / 256
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return math.exp(at_200)
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return math.exp(at_200 + (at_10 - at_200) * (200 - sampling_steps) / 190)


def family_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values that take the place of the defaults in config.py, which are FLUX.1-dev's.

    settings: pretrained_model_name_or_path, h, w and sampling_steps of the run.
    """
    index = model_index(str(settings["pretrained_model_name_or_path"]))
    if index.get("_class_name") != FLUX_2_KLEIN:
        return {}
    sizes = [settings[name] for name in ("h", "w", "sampling_steps")]
    if not all(isinstance(size, int) and 0 < size < 10**6 for size in sizes):
        return {}  # refused later
    return {
        "guidance_scale": 1.0 if index.get("is_distilled") else 4.0,
        "shift": flux_2_shift(*sizes),
        "lora_target_modules": "to_q to_k to_v to_out.0 to_qkv_mlp_proj".split(),
    }
