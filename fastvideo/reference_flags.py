"""Command lines of MixGRPO's, DanceGRPO's and BranchGRPO's trainers in this trainer's words.

REFERENCE_FLAGS says what becomes of each flag that this trainer doesn't have or reads otherwise. `translate` applies
it, and says each change in one line. The flags of a line without any of these keep their meaning.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from fastvideo.cli import OVERRIDE


class Reference(NamedTuple):
    """A flag of the references. ours: this trainer's flags for it, {} is its value; none: it has no effect here."""

    ours: str
    why: str


REFERENCE_FLAGS: dict[str, Reference] = {
    # Flags of all references. Most of them did nothing there either.
    "vae_model_path": Reference("", "the VAE comes from --pretrained_model_name_or_path"),
    "cache_dir": Reference("", "set HF_HOME in the environment"),
    "num_latent_t": Reference("", "a picture has one frame"),
    "t": Reference("", "a picture has one frame"),
    "ignore_last": Reference("", "the last step is never trained where all steps are stochastic"),
    "dit_model_name_or_path": Reference("", "the transformer comes from --pretrained_model_name_or_path"),
    "precondition_outputs": Reference("", "it did nothing there"),
    "logging_dir": Reference("", "metrics go to --output_dir"),
    "loss_coef": Reference("", "it did nothing there"),
    "train_sp_batch_size": Reference("", "--train_micro_batch_size sets the rows per forward pass"),
    # DanceGRPO
    "use_hpsv2": Reference("--reward_model=hpsv2", ""),
    "use_pickscore": Reference("--reward_model=pick_score", ""),
    "use_ema": Reference("--ema_decay=0.995", ", or the value of --ema_decay"),
    # BranchGRPO
    "tree_prob_weighted": Reference("--tree_fusion=probability", ""),
    "mix_ode_sde_tree": Reference("--algorithm=branch_grpo_mix", ""),
    "mix_sde_window_size": Reference("--group_size={}", ""),
    "width_pruning_mode": Reference("--tree_width_prune={}", ""),
    "width_pruning_ratio": Reference("--tree_width_prune_share={}", ""),
    "depth_pruning_slide": Reference("--depth_pruning_slide_interval=1", ", or the interval given"),
    "pruning_step_ratio": Reference("", "pruning applies in all iterations"),
    "tree_split_rounds": Reference("", "give --tree_split_points"),
}


class Line:
    """A command line as a list of flags, each with its words, and the notes on what was changed."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.flags: list[tuple[str, list[str]]] = []  # (name, words); words before the first flag have no name
        self.notes: list[str] = []
        for word in argv:
            found = re.match(r"--([A-Za-z]\w*)", word)
            if found or not self.flags:
                self.flags.append((found[1] if found else "", [word]))
            else:
                self.flags[-1][1].append(word)

    def __contains__(self, name: str) -> bool:
        return any(given == name for given, _ in self.flags)

    def value(self, name: str) -> str:
        """The last value given; empty without one."""
        words = next((words for given, words in reversed(self.flags) if given == name), [""])
        return " ".join([words[0].partition("=")[2], *words[1:]]).strip()

    def remove(self, name: str) -> None:
        self.flags = [flag for flag in self.flags if flag[0] != name]

    def put_first(self, flag: str, beside: str = "") -> None:
        """Adds --name=value before all others, so that a value in the line itself counts more.

        beside: a flag of the line. Flags of a recipe that stand before an OVERRIDE before it count less.
        """
        names = [name for name, _ in self.flags]
        before = names[: names.index(beside)] if beside in names else []
        place = max((i + 1 for i, name in enumerate(before) if f"--{name}" == OVERRIDE), default=0)
        self.flags.insert(place, (flag[2:].partition("=")[0], [flag]))

    def ignore(self, name: str, why: str) -> None:
        self.remove(name)
        self.notes.append(f"warning: --{name} has no effect here and is ignored: {why}")

    def replace(self, name: str, ours: str, why: str = "") -> None:
        typed = f"--{name} {self.value(name)}".strip()
        ours = ours.format(self.value(name))
        self.put_first(ours, beside=name)
        self.remove(name)
        self.notes.append(f"note: {typed} is {ours.replace('=', ' ')} here{why}")


def translate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(command line of this trainer, notes: one line per flag that is ignored or means something else here).

    argv: flags with underscores. Flags of this trainer stay, and count more than what a reference's flag becomes.
    """
    line = Line(argv)
    for name in {name.removeprefix("no_"): None for name, _ in line.flags if name.startswith("no_")}:
        if name in REFERENCE_FLAGS:  # a switch turned off
            line.remove(f"no_{name}")
    known = [name for name in dict.fromkeys(name for name, _ in line.flags) if name in REFERENCE_FLAGS]
    _window(line)
    if "hps_clip_path" in line:
        line.notes.append("note: --hps_clip_path isn't read: the HPS checkpoint holds the whole model")
    if known:
        _algorithm(line)
        _tree(line)
        _meanings(line)
    for name in known:
        if name in line:
            ours, why = REFERENCE_FLAGS[name]
            if ours:
                line.replace(name, ours, why)
            else:
                line.ignore(name, why)
    return [word for _, words in line.flags for word in words], line.notes


def _window(line: Line) -> None:
    """MixGRPO: -1 is its "off"; with a window, --flow_grpo_sampling chooses the stochastic step."""
    if re.fullmatch(r"-\d+", line.value("frozen_init_timesteps")):
        line.replace("frozen_init_timesteps", "--frozen_init_timesteps=0", ": off")
    window = line.value("training_strategy") == "part" or line.value("algorithm").startswith("mix_grpo")
    if window and "flow_grpo_sampling" in line:
        line.replace("flow_grpo_sampling", "--sde_type=flow", " with --training_strategy part")


def _algorithm(line: Line) -> None:
    """DanceGRPO and BranchGRPO had a trainer per algorithm, and no flag that names it."""
    dance = "use_hpsv2" in line or "use_pickscore" in line
    if not dance or {"algorithm", "training_strategy", "mix_ode_sde_tree"} & {name for name, _ in line.flags}:
        return
    tree = any(name.startswith("tree_") for name, _ in line.flags)
    lora = "lora_rank" in line or "lora_alpha" in line
    algorithm = "branch_grpo" if tree else "dance_grpo_lora" if lora else "dance_grpo"
    line.put_first(f"--algorithm={algorithm}")
    line.notes.append(f"note: without --algorithm this line of DanceGRPO's or BranchGRPO's trainer is {algorithm}")


def _tree(line: Line) -> None:
    """BranchGRPO: all edges train; depths slide only with --depth_pruning_slide, by default down to the last split."""
    if not (line.value("algorithm").startswith("branch_grpo") or "mix_ode_sde_tree" in line):
        return
    if "timestep_fraction" in line:
        line.ignore("timestep_fraction", "a tree trains all its edges, also in BranchGRPO's trainer")
    if "depth_pruning_slide" not in line:
        if "depth_pruning_slide_interval" in line:
            line.ignore("depth_pruning_slide_interval", "depths slide only with --depth_pruning_slide")
    elif "depth_pruning_stop_depth" not in line and (splits := re.findall(r"\d+", line.value("tree_split_points"))):
        line.put_first(f"--depth_pruning_stop_depth={max(map(int, splits))}")
        line.notes.append(f"note: --depth_pruning_stop_depth is the last split, {max(map(int, splits))}, as there")


def _meanings(line: Line) -> None:
    """Flags of both whose value or default means something else."""
    if not {"parallel", "fsdp_sharding_startegy", "quantize_base"} & {name for name, _ in line.flags}:
        line.put_first("--fsdp_sharding_startegy=full")
        line.notes.append("note: several processes share the model by --fsdp_sharding_startegy full, the default there")
    if line.value("reward_model") == "multi_reward" and "image_reward_mode" not in line:
        line.put_first("--image_reward_mode=overall")
        line.notes.append(
            "note: multi_reward is with --image_reward_mode overall, as in MixGRPO; granular: three weighted scorers"
        )
    if line.value("ema_decay").strip("0.") and "use_ema" not in line:
        line.notes.append("note: --ema_decay averages the weights here; 0 switches it off")
    if line.value("frozen_init_timesteps").strip("0"):
        line.notes.append("note: --frozen_init_timesteps trains the first steps here, random ones in MixGRPO's trainer")
    prompts, k = line.value("train_batch_size"), line.value("gradient_accumulation_steps")
    if prompts.isdigit() and int(prompts) > 1 and k:
        line.notes.append(
            f"note: --gradient_accumulation_steps {k} counts samples (a tree: edges) of each prompt here; in the "
            f"references, of all {prompts} prompts of a process: {prompts} times as many optimizer steps"
        )
