"""What an optimizer step trains: the transitions of a plan that its samples went through, in micro-batches."""

import math
from dataclasses import dataclass

from fastvideo.config import GRPOConfig
from fastvideo.utils.advantages import sample_order
from fastvideo.utils.plan import Plan

import numpy as np

# What a random stream of a prompt is for: the last entry of its seed. 0 is noise (sampling_utils.Noise).
STEP_SUBSET, ORDER = 1, 2


@dataclass(frozen=True)
class Transition:
    """A trained transition of this rank: step position in the plan, row before it, row after it, its advantage, and
    its weight in the loss of its optimizer step.
    """

    position: int
    parent: int
    child: int
    prompt: int
    advantage: float
    weight: float = 1.0


def slice_transitions(
    plan: Plan, order: np.ndarray, trained: np.ndarray, advantages: dict[int, np.ndarray]
) -> list[Transition]:
    """The transitions of one optimizer step, sorted so that those leaving one row stand together. Weights make their
    loss the mean over prompts of the mean over a prompt's transitions.

    Args:
        order: [P, k] samples of this step. trained: [P, G, n] plan positions.
        advantages: position that this step trains -> [P, rows after it], NaN where the transition is pruned.
    """
    group, rows, found = trained.shape[1], plan.rows, []
    for prompt, samples in enumerate(order):
        edges = {}  # samples that still are one row share a transition
        for sample in samples:
            for position in advantages.keys() & trained[prompt, sample].tolist():
                row = int(sample) * rows[position] // group
                advantage = float(advantages[position][prompt, row])
                if not math.isnan(advantage):
                    edges[position, prompt * rows[position] + row] = advantage
        for (position, child), advantage in edges.items():
            weight = 1 / (len(order) * len(edges))
            found.append(Transition(position, child // plan[position].branch, child, prompt, advantage, weight))
    return sorted(found, key=lambda t: (t.position, t.parent, t.child))


def micro_batches(transitions: list[Transition], size: int) -> list[list[Transition]]:
    """As few parts of at most `size` distinct rows as there can be, about equally long: one forward and backward pass
    serves all transitions that leave a row.
    """
    rows = {row: i for i, row in enumerate(dict.fromkeys((t.position, t.parent) for t in transitions))}
    parts = math.ceil(len(rows) / size)
    batches: list[list[Transition]] = [[] for _ in range(parts)]
    for t in transitions:
        batches[rows[t.position, t.parent] * parts // len(rows)].append(t)
    return batches


def prompt_rng(config: GRPOConfig, number: int, slot: int, purpose: int) -> np.random.Generator:
    """Random choices of one prompt, a function of (seed, iteration, prompt slot) and what they are for."""
    return np.random.default_rng([config.seed, number, slot, purpose])


def trained_positions(config: GRPOConfig, plan: Plan, number: int, slots: range) -> np.ndarray:
    """Plan positions that each sample trains, [P, G, n]: all trained steps, or a random share for each sample."""
    positions, group = np.array(plan.trained), config.num_generations
    if config.training_strategy == "part" or config.frozen_init_timesteps:
        return np.broadcast_to(positions, (len(slots), group, len(positions)))
    count = int(len(positions) * config.timestep_fraction)
    rngs = [prompt_rng(config, number, slot, STEP_SUBSET) for slot in slots]
    return np.stack(
        [np.stack([np.sort(rng.choice(positions, count, replace=False)) for _ in range(group)]) for rng in rngs]
    )


def deal_out(
    config: GRPOConfig, plan: Plan, number: int, slots: range, advantages: dict[int, np.ndarray]
) -> list[list[list[Transition]]]:
    """The micro-batches of each optimizer step of iteration `number`, for the prompts in `slots`.

    Step s trains samples [ks, ks+k) of every prompt's group, after --advantage_rerange_strategy has put them in order.

    Args:
        advantages: position -> [P of all ranks, rows after it]; here they are clamped to ± adv_clip_max.
    """
    most = config.adv_clip_max
    own = {position: np.clip(values[slots.start : slots.stop], -most, most) for position, values in advantages.items()}
    whole = np.nan_to_num(own[max(own)])
    whole = whole.repeat(config.num_generations // whole.shape[1], axis=1)  # samples may still be one row there
    rngs = [prompt_rng(config, number, slot, ORDER) for slot in slots]
    pairs = zip(whole, rngs, strict=True)
    order = np.stack([sample_order(values, config.advantage_rerange_strategy, rng) for values, rng in pairs])
    trained, work = trained_positions(config, plan, number, slots), []
    for samples, positions in plan.updates(config.num_generations, config.gradient_accumulation_steps):
        transitions = slice_transitions(plan, order[:, samples], trained, {p: own[p] for p in positions})
        work.append(micro_batches(transitions, config.train_micro_batch_size))
    return work
