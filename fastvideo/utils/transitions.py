"""Deals out transitions: each optimizer step trains the transitions of its samples, in micro-batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastvideo.config import GRPOConfig
from fastvideo.utils.advantages import sample_order
from fastvideo.utils.plan import Plan

import numpy as np
import torch

# The last entry of a prompt's random seed says what the numbers are for. 0 is noise (sampling_utils.Noise).
STEP_SUBSET, ORDER, EDGES, DRAWS, CANDIDATES = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Transition:
    """A trained transition of this rank: plan position of its step, rows before and after the step (parent, child),
    prompt, advantage, and weight in the loss of its optimizer step. In a plan with draws: number of the draw, picture.
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
    """The transitions of one optimizer step, sorted by the row they leave. Their weights make the loss the mean over
    prompts of the mean over a prompt's transitions.

    Args:
        order: [P, k] samples of this optimizer step. trained: [P, G, n] positions (`Plan.training`) that each sample
            trains.
        advantages: trained plan position -> [P, rows after the step], NaN where the transition is pruned.
    """
    group, found = trained.shape[1], []
    for prompt, samples in enumerate(order):
        edges = {}  # samples that share a row share its transition
        for sample in samples:
            for position in advantages.keys() & trained[prompt, sample].tolist():
                rows = plan.training[position][0]
                row = int(sample) * rows // group
                advantage = float(advantages[position][prompt, row])
                if not math.isnan(advantage):
                    edges[position, prompt * rows + row] = advantage
        for (position, child), advantage in edges.items():
            weight, branch = 1 / (len(order) * len(edges)), plan.training[position][1]
            found.append(Transition(position, child // branch, child, prompt, advantage, weight))
    return sorted(found, key=_by_row)


def split_edges(
    transitions: list[Transition], parts: int, rngs: Sequence[np.random.Generator]
) -> list[list[Transition]]:
    """Splits each prompt's transitions at random into `parts` parts of about equal size, one per optimizer step.

    A part is never empty: a prompt with fewer transitions than parts repeats them. The weights make the loss of a part
    the mean over prompts of the mean over the prompt's transitions in it. BranchGRPO's code shuffles edges too.

    Args:
        rngs: one generator per prompt.
    """
    found: list[list[Transition]] = [[] for _ in range(parts)]
    for prompt, rng in enumerate(rngs):
        own = [t for t in transitions if t.prompt == prompt]
        shuffled = rng.permutation(len(own))
        for number, part in enumerate(found):
            first, last = (i * len(own) // parts for i in (number, number + 1))
            chosen = shuffled[first : max(last, first + 1)]
            part += [replace(own[i], weight=1 / (len(rngs) * len(chosen))) for i in chosen]
    return [sorted(part, key=_by_row) for part in found]


def _by_row(t: Transition) -> tuple[int, int, int]:
    return t.position, t.parent, t.child


def micro_batches(transitions: list[Transition], size: int) -> list[list[Transition]]:
    """As few parts as possible, about equally long, each with at most `size` distinct rows. All transitions that leave
    one row stay together: they share one forward and backward pass.
    """
    rows = {row: i for i, row in enumerate(dict.fromkeys((t.position, t.parent) for t in transitions))}
    parts = math.ceil(len(rows) / size)
    batches: list[list[Transition]] = [[] for _ in range(parts)]
    for t in transitions:
        batches[rows[t.position, t.parent] * parts // len(rows)].append(t)
    return batches


def prompt_rng(config: GRPOConfig, number: int, slot: int, purpose: int) -> np.random.Generator:
    """Random generator of one prompt, seeded with (seed, iteration, prompt slot, purpose)."""
    return np.random.default_rng([config.seed, number, slot, purpose])


def trained_positions(config: GRPOConfig, plan: Plan, number: int, slots: range) -> np.ndarray:
    """Positions that each sample trains, [P, G, n]: all trained steps or draws, or a random share per sample."""
    positions, group = np.array(list(plan.training)), config.num_generations
    if config.training_strategy == "part" or config.frozen_init_timesteps or plan.draws:
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

    Optimizer step s trains samples [ks, ks+k) of every group, in the order of --advantage_rerange_strategy. The
    optimizer steps of a tree share its edges at random.

    Args:
        advantages: plan position -> [P of all ranks, rows after the step]. Here they are clamped to ± adv_clip_max and
            multiplied by the weight of their step.
    """
    most, factors = config.adv_clip_max, plan.step_weights(config.step_weights)
    own = {p: np.clip(values[slots.start : slots.stop], -most, most) * factors[p] for p, values in advantages.items()}
    whole = np.nan_to_num(own[max(own)])
    whole = whole.repeat(config.num_generations // whole.shape[1], axis=1)  # samples may share a row
    rngs = [prompt_rng(config, number, slot, ORDER) for slot in slots]
    pairs = zip(whole, rngs, strict=True)
    order = np.stack([sample_order(values, config.advantage_rerange_strategy, rng) for values, rng in pairs])
    trained, work = trained_positions(config, plan, number, slots), []
    for samples, positions in plan.updates(config.num_generations, config.gradient_accumulation_steps):
        transitions = slice_transitions(plan, order[:, samples], trained, {p: own[p] for p in positions})
        shares = [transitions]
        if plan.parts is not None:
            rngs = [prompt_rng(config, number, slot, EDGES) for slot in slots]
            shares = split_edges(transitions, plan.parts, rngs)
        work += [micro_batches(share, config.train_micro_batch_size) for share in shares]
    return work


def even_out(
    work: list[list[list[Transition]]], gather: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> list[list[list[Transition]]]:
    """`work` with the same number of micro-batches per optimizer step on all ranks. Added ones have weight 0.

    gather: puts the rows of all processes together. All processes must call it.
    """
    counts = torch.tensor([[len(batches) for batches in work]], device=device)
    most = gather(counts).amax(0).tolist()
    filled = [[replace(t, weight=0.0) for t in batches[-1]] for batches in work]
    return [batches + [last] * (count - len(batches)) for batches, last, count in zip(work, filled, most, strict=True)]
