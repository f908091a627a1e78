"""Settings of sample_flux.py. This module imports nothing slow, because command lines read it before --help."""

from dataclasses import dataclass, replace
from pathlib import Path

from fastvideo.cli import FlagError, check_fields, flag
from fastvideo.io.devices import DTYPES
from fastvideo.io.prompts import COLUMN_HELP, FORMATS
from fastvideo.io.words import counted


@dataclass
class SampleConfig:
    """Settings of a sampling run."""

    pretrained_model_name_or_path: str | None = flag(
        None,
        "base FLUX.1 or FLUX.2 klein pipeline: a folder or a hub id (None: the one of the checkpoint or merged "
        "model --model_path; else data/flux)",
        section="model",
    )
    flux_baseline_model_dir: str | None = flag(None, "another name of --pretrained_model_name_or_path")
    model_path: str | None = flag(
        None,
        "tuned model: a training checkpoint or its ema/, a folder with a transformer, LoRA adapters or a whole "
        "pipeline, a .safetensors file of the base model's architecture, or a hub id",
    )
    baseline: bool = flag(False, "sample only the base model, even if model_path is given")
    prompts_file: str = flag(
        "data/prompts_test.txt",
        f"prompts: {FORMATS}, or a folder of HPSv2 benchmark prompts (anime.json, ...)",
        section="prompts",
    )
    prompt_column: str | None = flag(None, COLUMN_HELP)
    output_dir: str = flag("outputs/samples", "folder for the pictures", section="output")
    output_json: str | None = flag(None, "manifest to write (None: manifest.json in output_dir; sweep.json of a sweep)")
    image_format: str = flag("png", "file format; jpg loses detail", choices=["png", "jpg"])
    seed: int = flag(42, "seed of the initial noise", at_least=0, below=2**63, section="sampling")
    images_per_prompt: int = flag(1, "pictures of each prompt, each with its own noise", at_least=1, at_most=10**4)
    batch_size: int = flag(1, "pictures sampled at a time; changes speed and memory only", at_least=1)
    h: int = flag(1024, "picture height in pixels", at_least=16, at_most=2**14)
    w: int = flag(1024, "picture width in pixels", at_least=16, at_most=2**14)
    guidance_scale: float | None = flag(
        None,
        "guidance: distilled in FLUX.1-dev; classifier-free in FLUX.2 klein base, with two passes per step, off at 1 "
        "(None: 3.5 and 4)",
        at_least=-1000,
        at_most=1000,
    )
    total_sampling_steps: int = flag(50, "denoising steps", at_least=1, at_most=1000)
    mix_sampling_steps: int | None = flag(
        None, "steps the tuned model takes before the base model goes on (None, 0 or -1: all, as in MixGRPO's script)"
    )
    mix_fraction: list[float] = flag(
        [], "the same as a share of all steps (the paper recommends 0.8); several are sampled one after the other"
    )
    shift: float | None = flag(
        None, "static shift of the sigma schedule (None: the base pipeline's own scheduler)", at_least=1e-3, at_most=1e3
    )
    max_sequence_length: int = flag(
        512, "T5 tokens; cut to what the model's tokenizer declares, and to 256 for FLUX.1-schnell", at_least=1
    )
    dtype: str = flag(
        "auto",
        "number format; auto: bf16 on a GPU, fp32 on the CPU",
        choices=["auto", *DTYPES],
        section="speed and memory",
    )
    device: str = flag("auto", "cpu, cuda (the process's own), cuda:1, ... or auto")
    compile: bool = flag(False, "compile the transformers' blocks: a slow start, then faster steps")
    cpu_offload: str = flag(
        "none",
        "keep in GPU memory only the model at work (model) or only the layer at work (sequential, slow)",
        choices=["none", "model", "sequential"],
    )
    overwrite: bool = flag(False, "replace the pictures of other settings or prompts in the folder", section="output")

    def __post_init__(self) -> None:
        base, other = self.pretrained_model_name_or_path, self.flux_baseline_model_dir
        if other is not None:
            if base not in (None, other):
                problem = f"--pretrained_model_name_or_path is {base}; give one of them"
                raise FlagError("flux_baseline_model_dir", other, problem)
            self.pretrained_model_name_or_path = other
        if self.mix_sampling_steps in (-1, 0):
            self.mix_sampling_steps = None
        check_fields(self)
        if self.model_path is None and not self.baseline:
            raise FlagError("model_path", None, "give the tuned model, or --baseline for the base model")
        if self.compile and self.cpu_offload == "sequential":
            raise FlagError("compile", None, "its graphs can't move layers; choose --cpu_offload none or model")
        self._check_mix()

    @staticmethod
    def outdone(before: dict[str, object], after: dict[str, object]) -> dict[str, str]:
        """{flag from the environment: flag given by hand that is another name of it}, see fastvideo/cli.py."""
        base, other = "pretrained_model_name_or_path", "flux_baseline_model_dir"
        return {base: other} if base in before and other in after and base not in after else {}

    def _check_mix(self) -> None:
        steps, total = self.mix_sampling_steps, self.total_sampling_steps
        if self.mix_fraction:
            shares = ",".join(f"{fraction:g}" for fraction in self.mix_fraction)
            if steps is not None:
                raise FlagError("mix_fraction", shares, "give either this or --mix_sampling_steps")
            if not all(0 <= fraction <= 1 for fraction in self.mix_fraction):
                raise FlagError("mix_fraction", shares, "must be between 0 and 1")
            for fraction, taken in zip(self.mix_fraction, self._mix_steps(), strict=True):
                if taken in (0, total) and taken != fraction * total:
                    problem = f"{fraction:g} is {taken} of --total_sampling_steps {total}"
                    raise FlagError("mix_fraction", shares, problem)
            if len(set(self._mix_steps())) < len(self.mix_fraction):
                problem = f"two shares are the same number of --total_sampling_steps {total}"
                raise FlagError("mix_fraction", shares, problem)
            if self.baseline:
                raise FlagError("baseline", None, f"takes no share of --mix_fraction {shares}")
        if steps is not None:
            if not 0 < steps <= total:
                problem = f"must be between 1 and --total_sampling_steps {total}, or -1 for all"
                raise FlagError("mix_sampling_steps", steps, problem)
            if self.baseline:
                raise FlagError("baseline", None, f"takes no share of --mix_sampling_steps {steps}")

    def _mix_steps(self) -> list[int]:
        return [int(fraction * self.total_sampling_steps + 0.5) for fraction in self.mix_fraction]

    @property
    def is_sweep(self) -> bool:
        """Whether several shares are sampled, each in its own folder."""
        return len(self.mix_fraction) > 1

    def runs(self) -> list["SampleConfig"]:
        """One configuration per share of `--mix_fraction`, each with the folder that it has in a sweep."""
        found = []
        for steps in self._mix_steps():
            places = {}
            if self.is_sweep:
                name = f"mix_{steps}_{self.total_sampling_steps}"
                places["output_dir"] = str(Path(self.output_dir) / name)
                if self.output_json:
                    path = Path(self.output_json)
                    places["output_json"] = str(path.with_name(f"{path.stem}_{name}.json"))
            share = {"mix_sampling_steps": steps} if steps else {"baseline": True}
            found.append(replace(self, mix_fraction=[], **share, **places))
        return found or [self]

    @property
    def tuned_steps(self) -> int:
        """Number of steps, from the first on, that the tuned transformer takes. For configurations of `runs`."""
        if self.baseline:
            return 0
        return self.total_sampling_steps if self.mix_sampling_steps is None else self.mix_sampling_steps

    @property
    def models(self) -> str:
        """Which model takes which steps, in words. For configurations of `runs`."""
        tuned, rest = self.tuned_steps, self.total_sampling_steps - self.tuned_steps
        parts = [(self.model_path, tuned), (f"base model {self.pretrained_model_name_or_path}", rest)]
        return ", then ".join(f"{counted(steps, 'step')} of {model}" for model, steps in parts if steps)

    @property
    def manifest(self) -> Path:
        """The file that is written last: the manifest, or for a sweep the list of its manifests."""
        default = Path(self.output_dir) / ("sweep.json" if self.is_sweep else "manifest.json")
        return Path(self.output_json) if self.output_json else default
