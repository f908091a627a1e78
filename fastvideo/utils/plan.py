"""A rollout plan: a tree of steps that knows its rows, leaves, coefficients and cost."""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property

from fastvideo.utils.steps import KINDS, STEP_WEIGHTS, Coefficients, Step, entropy

import numpy as np


@dataclass(frozen=True)
class Plan:
    """The steps of a rollout and all numbers derived from the steps, computed once.

    Each step starts from the result of an earlier step, its parent. Steps with the same parent share its state and one
    velocity evaluation. `branch` is the number of successors per row. A step without children is a leaf: its rows are
    pictures. A position is an index into `steps`; −1 means the initial noise.

    Attributes:
        steps: all transitions. start: rows per prompt at the beginning.
        parts: optimizer steps that share the transitions of all samples, see `split_edges`. None: each optimizer step
            takes its own samples, see `updates`.
        draws: number of times and noises at which each finished picture is trained. 0: steps are trained.
    """

    steps: tuple[Step, ...]
    start: int = 1
    parts: int | None = None
    draws: int = 0

    def check(self) -> "Plan":
        """The plan itself, if it can be executed and trained.

        Raises:
            ValueError: steps leave a gap, don't run from σ = 1 to 0, train or branch without noise, or none is trained.
        """
        for i, (step, parent) in enumerate(zip(self.steps, self.parents, strict=True)):
            if not -1 <= parent < i:
                raise ValueError(f"step {step.index} at position {i} starts from position {parent}, which comes later")
            if parent == -1 and step.sigma != 1:
                raise ValueError(f"a plan runs from sigma 1 to 0, this one from {step.sigma}")
            if parent >= 0 and self.steps[parent].sigma_next != step.sigma:
                before = self.steps[parent]
                raise ValueError(
                    f"step {before.index} ends at sigma {before.sigma_next}, but the next starts at {step.sigma}"
                )
            if step.kind not in KINDS:
                raise ValueError(f"step {step.index}: unknown kind {step.kind!r}; choose from {list(KINDS)}")
            if step.sigma <= step.sigma_next:
                raise ValueError(f"step {step.index}: sigma must fall, not go from {step.sigma} to {step.sigma_next}")
        for leaf in self.leaves:
            if self.steps[leaf].sigma_next != 0:
                raise ValueError(f"a plan runs from sigma 1 to 0, this one to {self.steps[leaf].sigma_next}")
        for step, numbers in zip(self.steps, self.coefficients, strict=True):
            if (step.train or step.branch > 1) and not numbers.std > 0:
                where = f"step {step.index} ({step.kind})"
                raise ValueError(f"{where} has no noise: it can be neither trained nor branched")
        if bool(self.trained) == bool(self.draws):
            raise ValueError("the plan trains both steps and draws" if self.draws else "the plan trains no step")
        return self

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __getitem__(self, position: int) -> Step:
        return self.steps[position]

    # --- the tree ---------------------------------------------------------------------------------------------------

    @cached_property
    def parents(self) -> list[int]:
        """Position of each step's parent."""
        return [i - 1 if step.parent is None else step.parent for i, step in enumerate(self.steps)]

    def path(self, position: int) -> list[int]:
        """Positions of the steps from the initial noise to `position`, inclusive."""
        found: list[int] = []
        while position >= 0:
            found.insert(0, position)
            position = self.parents[position]
        return found

    def trained_path(self, position: int) -> list[int]:
        """Positions of the trained steps on `path`."""
        return [i for i in self.path(position) if self.steps[i].train]

    @cached_property
    def trained(self) -> list[int]:
        """Positions of the trained steps."""
        return [i for i, step in enumerate(self.steps) if step.train]

    @cached_property
    def trained_states(self) -> set[int]:
        """States from which a trained step starts, as positions of the steps that lead to them (−1: noise)."""
        return {self.parents[i] for i in self.trained}

    def untrained_states(self, prefix: bool) -> set[int]:
        """States from which only untrained steps start, given as in `trained_states`.

        prefix: whether states before the trained steps count too, not only those after a trained step. All count in a
        plan that trains no step (draws, candidates of scouting).
        """
        everywhere = prefix or not self.trained
        return {i for i in {*self.parents} - self.trained_states if everywhere or self.trained_path(i)}

    @cached_property
    def training(self) -> dict[int, tuple[int, int]]:
        """What an iteration trains: position of a trained step, or number of a draw, both from 0 -> rows per prompt,
        and successors per row."""
        if self.draws:
            return {draw: (self.pictures, 1) for draw in range(self.draws)}
        return {i: (self.rows[i], self.steps[i].branch) for i in self.trained}

    @cached_property
    def leaves(self) -> list[int]:
        """Positions of the leaves, in the order of their pictures. Leaves without a trained step on their path
        (E-GRPO's anchors) come last."""
        followed = set(self.parents)
        found = [i for i in range(len(self.steps)) if i not in followed]
        return sorted(found, key=lambda leaf: not self.trained_path(leaf))

    # --- numbers ----------------------------------------------------------------------------------------------------

    @cached_property
    def coefficients(self) -> list[Coefficients]:
        """Coefficients of every step."""
        earlier = [[self.steps[i].sigma for i in reversed(self.path(p)[:-1])] for p in range(len(self.steps))]
        return [KINDS[step.kind].coefficients(step, sigmas) for step, sigmas in zip(self.steps, earlier, strict=True)]

    @property
    def entropies(self) -> list[float]:
        """e^h of every trained step."""
        return [entropy(self.coefficients[i].std) for i in self.trained]

    def metrics(self) -> dict[str, list]:
        """Of every trained step: its index in the schedule, the steps that it merges, and its e^h."""
        steps = [self.steps[i] for i in self.trained]
        return {"window": [s.index for s in steps], "merges": [s.span for s in steps], "entropies": self.entropies}

    def step_weights(self, name: str) -> dict[int, float]:
        """Key of `training` -> weight of its loss, by an entry of STEP_WEIGHTS. The mean of the weights is 1."""
        if self.draws:
            return dict.fromkeys(self.training, 1.0)
        weights = {i: STEP_WEIGHTS[name](self.coefficients[i]) for i in self.trained}
        mean = sum(weights.values()) / len(weights)
        return {i: weight / mean for i, weight in weights.items()}

    # --- rows and pictures per prompt -------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> list[int]:
        """Rows per prompt after every step."""
        rows: list[int] = []
        for step, parent in zip(self.steps, self.parents, strict=True):
            rows.append((rows[parent] if parent >= 0 else self.start) * step.branch)
        return rows

    @cached_property
    def columns(self) -> dict[int, slice]:
        """Leaf -> the columns of its pictures among the pictures of a prompt."""
        found, end = {}, 0
        for leaf in self.leaves:
            found[leaf] = slice(end, end + self.rows[leaf])
            end += self.rows[leaf]
        return found

    @property
    def pictures(self) -> int:
        """Pictures per prompt."""
        return sum(self.rows[leaf] for leaf in self.leaves)

    @cached_property
    def trained_pictures(self) -> int:
        """Pictures per prompt that come from a trained step, or all with draws. These pictures come first."""
        if self.draws:
            return self.pictures
        return sum(self.rows[leaf] for leaf in self.leaves if self.trained_path(leaf))

    def group_places(self, group: int) -> np.ndarray:
        """Place of each picture of a prompt in its group, 0 ≤ place < `group`: [pictures]."""
        return np.concatenate([np.arange(self.rows[leaf]) * group / self.rows[leaf] for leaf in self.leaves])

    def groups(self, prompts: int) -> np.ndarray:
        """The number of each picture's group, for the pictures of `prompts` prompts: [prompts · pictures].

        The pictures of one prompt and leaf are a group: advantages compare their scores.
        """
        own = np.repeat(np.arange(len(self.leaves)), [self.rows[leaf] for leaf in self.leaves])
        return (np.arange(prompts)[:, None] * len(self.leaves) + own).ravel()

    # --- cost and training ------------------------------------------------------------------------------------------

    @cached_property
    def evaluations(self) -> int:
        """Velocity evaluations (NFE) per prompt in the rollout: one per row of every state that a step starts from."""
        return self.evaluations_of({*self.parents})

    def evaluations_of(self, states: set[int]) -> int:
        """Those of some states, given as positions of the steps that lead to them (−1: noise)."""
        return sum(self.rows[state] if state >= 0 else self.start for state in states)

    @property
    def evaluations_without_sharing(self) -> int:
        """NFE per prompt if every picture were sampled separately."""
        return sum(self.rows[leaf] * len(self.path(leaf)) for leaf in self.leaves)

    def updates(self, samples: int, k: int) -> list[tuple[slice, list[int]]]:
        """The optimizer steps of an iteration: for each, its samples of every group and the plan positions it trains.

        Each optimizer step takes k of a group's `samples`. Trained steps on one path share an optimizer step; trained
        steps on different paths (E-GRPO's active steps) have separate optimizer steps. In a plan with `parts` there is
        one entry with all samples, which `parts` optimizer steps share. Draws share an optimizer step too.
        """
        if self.parts is not None:
            return [(slice(0, samples), self.trained)]
        if self.draws:
            return [(slice(s, s + k), list(self.training)) for s in range(0, samples, k)]
        paths: dict[int, list[int]] = {}
        for position in self.trained:
            paths.setdefault(self.trained_path(position)[0], []).append(position)
        return [(slice(s, s + k), positions) for positions in paths.values() for s in range(0, samples, k)]

    def optimizer_steps(self, samples: int, k: int) -> int:
        """Number of optimizer steps of an iteration."""
        return len(self.updates(samples, k)) * (self.parts or 1)

    def describe(self, in_float8: Container[int] = ()) -> str:
        """One line per step: index, sigmas, kind, rows per prompt, noise, splits, whether it is trained.

        in_float8: states, given as in `trained_states`, whose velocities are computed in FP8.
        """
        lines = []
        for i, (step, parent, numbers) in enumerate(zip(self.steps, self.parents, self.coefficients, strict=True)):
            notes = [f"std {numbers.std:.4f}, e^h {entropy(numbers.std):.2f}"] if numbers.std else []
            notes += [f"covers {step.span} steps"] if step.span > 1 else []
            notes += [f"splits into {step.branch}"] if step.branch > 1 else []
            notes += ["trained"] if step.train else ["in FP8"] if parent in in_float8 else []
            kind = f"{step.kind} order {step.order}" if step.kind == "dpmpp" else step.kind
            origin = "" if parent == i - 1 else f"  (from the state before step {step.index}, line {parent + 1})"
            lines.append(
                f"  {step.index:3d}  {step.sigma:.4f} -> {step.sigma_next:.4f}  {kind:<14} "
                f"rows {self.rows[parent] if parent >= 0 else self.start:3d}  " + ", ".join(notes) + origin
            )
        return "\n".join(lines)
