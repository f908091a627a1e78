"""Settings of eval_reward.py. This module imports nothing slow, because command lines read it before --help."""

from dataclasses import dataclass

from fastvideo.cli import FlagError, check_fields, flag
from fastvideo.models.reward_model.spec import REWARDS, RewardConfig, resolve_reward_spec

NO_RIVALS = "compares pictures; give --baseline_manifest, whose picture of the same index each picture is compared with"
# Flags of the reference, and what they are called here.
OTHER_NAMES = {
    "prompt_file": "manifest",
    "single_img": "image",
    "single_img_prompt": "prompt",
    "batch_size": "reward_batch_size",
    "reward_model": "reward_model_type",
}


@dataclass
class EvalConfig(RewardConfig):
    """Settings of an evaluation."""

    manifest: str | None = flag(
        None,
        "pictures: a manifest of sample_flux.py, or with --benchmark_prompts a folder in the HPSv2 benchmark's layout",
        section="pictures and rewards",
    )
    image: str | None = flag(None, "score this one picture instead of a manifest; needs --prompt")
    prompt: str | None = flag(None, "prompt of --image")
    reward_model_type: str = flag("all", "reward models: all, a name or a comma list, as in training's --reward_model")
    output_json: str | None = flag(None, "scores to write (None: {manifest}_scores.json beside the manifest)")
    baseline_manifest: str | None = flag(
        None, "pictures of the base model for the same prompts and seeds, for paired differences"
    )
    benchmark_prompts: str | None = flag(
        None, "folder of HPSv2 benchmark prompts (anime.json, ...): manifests are folders of {style}/{number:05d}.jpg"
    )
    trained_rewards: str | None = flag(None, "--reward_model of the training; the other rewards count as held out")
    hacking_measures: bool = flag(True, "also measure saturation, sharpness, high frequencies and diversity")
    device: str = flag("auto", "cpu, cuda (the process's own), cuda:1, ... or auto; --reward_device goes before it")
    prompt_file: str | None = flag(None, "another name of --manifest", section="other names")
    single_img: str | None = flag(None, "another name of --image")
    single_img_prompt: str | None = flag(None, "another name of --prompt")
    batch_size: int | None = flag(None, "another name of --reward_batch_size")
    reward_model: str | None = flag(None, "another name of --reward_model_type")

    # Settings of a training that granular rewards ask for; without a training they decide nothing.
    granular_schedule, granular_gamma = "linear", None

    def __post_init__(self) -> None:
        for other, name in OTHER_NAMES.items():
            if getattr(self, other) is not None:
                setattr(self, name, getattr(self, other))
        if (self.manifest is None) == (self.image is None):
            raise FlagError("manifest", self.manifest, "give either --manifest or --image")
        if (self.image is None) != (self.prompt is None):
            given = "image" if self.prompt is None else "prompt"
            raise FlagError(given, getattr(self, given), "--image and --prompt go together")
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt or ""):
            raise FlagError("prompt", ascii(self.prompt), "isn't UTF-8 text")
        if self.baseline_manifest is not None and self.manifest is None:
            raise FlagError("baseline_manifest", self.baseline_manifest, "needs --manifest")
        if self.benchmark_prompts is not None and self.manifest is None:
            raise FlagError("benchmark_prompts", self.benchmark_prompts, "needs --manifest, the folder of the pictures")
        check_fields(self)
        names = resolve_reward_spec(self, "reward_model_type")
        if self.baseline_manifest is None and any(name in REWARDS and REWARDS[name].groupwise for name in names):
            raise FlagError("reward_model_type", self.reward_model_type, NO_RIVALS)
        self.trained_keys()

    def trained_keys(self) -> set[str] | None:
        """The registry's names of the `--trained_rewards` with a weight above 0; None where the flag isn't given."""
        if self.trained_rewards is None:
            return None
        weights = resolve_reward_spec(self, "trained_rewards")
        return {key for key, weight in weights.items() if weight > 0}

    @property
    def granular_end_weights(self) -> list[float]:
        """Equal to the start weights, as weights don't move in an evaluation."""
        return self.granular_start_weights
