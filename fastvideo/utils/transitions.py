"""What an optimizer step trains: the transitions of a plan that its samples went through, in micro-batches."""

import math
from dataclasses import dataclass

from fastvideo.utils.plan import Plan

import numpy as np


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
