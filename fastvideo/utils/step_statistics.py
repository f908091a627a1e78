"""What the transitions of an iteration say together: mean losses, and how far each step's ratios move from 1."""

from collections.abc import Callable, Sequence

from fastvideo.utils.plan import Plan
from fastvideo.utils.sampling_utils import to_device
from fastvideo.utils.transitions import Transition

import torch


class StepStatistics:
    """Sums over the transitions of an iteration. The GPU adds; nothing waits for it until `metrics`.

    Attributes:
        by_step: [positions, 5]: transitions, clipped above, clipped below, log r, (log r)².
        means: name of a loss or share -> its mean over optimizer steps. deviations: max |r − 1| of each micro-batch.
        first: number of micro-batches before the first update.
    """

    def __init__(self, plan: Plan, optimizer_steps: int, device: torch.device) -> None:
        self.names = {i: f"draw_{i}" if plan.draws else f"step_{plan[i].index}" for i in plan.training}
        self.by_step = torch.zeros(max(plan.training) + 1, 5, device=device)
        self.optimizer_steps, self.first = optimizer_steps, 0
        self.means: dict[str, torch.Tensor] = {}
        self.deviations: list[torch.Tensor] = []

    def add(
        self, batch: Sequence[Transition], weights: torch.Tensor, parts: dict[str, torch.Tensor], first: bool
    ) -> None:
        """Adds the N transitions of a micro-batch.

        Args:
            weights: [N]. parts: values without gradient, each [N], among them `ratio`, `clip_high`, `clip_low`,
                `log_ratio`. first: whether no update of this iteration came before.
        """
        ratio, change = parts["ratio"], parts["log_ratio"]
        position, counts = (
            to_device(values, self.by_step.device)
            for values in ([t.position for t in batch], [float(t.weight > 0) for t in batch])  # 0: added to fill up
        )
        columns = torch.stack([torch.ones_like(change), parts["clip_high"], parts["clip_low"], change, change**2], 1)
        self.by_step.index_add_(0, position, columns * counts[:, None])
        for name, part in parts.items():
            if name != "log_ratio":  # its mean over steps says little
                self.means[name] = self.means.get(name, 0) + part @ weights / self.optimizer_steps
        self.deviations.append((ratio - 1).abs().max())
        self.first += first

    def metrics(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The metrics of all processes, which must call it together: means; `ratio_first_deviation` and
        `ratio_max_deviation`, the largest |r − 1| before the first update and of all; and those of each step.

        gather: puts the rows of all processes together.
        """
        most = [torch.stack(self.deviations[: self.first]).max(), torch.stack(self.deviations).max()]
        local = torch.cat([torch.stack([*self.means.values(), *most]), self.by_step.flatten()])
        everywhere, count = gather(local[None]).cpu(), len(self.means)
        found = dict(zip(self.means, everywhere[:, :count].mean(0).tolist(), strict=True))
        found["ratio_mean"], found["clip_frac"] = found.pop("ratio"), found["clip_high"] + found["clip_low"]
        names = ("ratio_first_deviation", "ratio_max_deviation")
        found |= dict(zip(names, everywhere[:, count : count + 2].amax(0).tolist(), strict=True))
        return found | self._of_steps(everywhere[:, count + 2 :].sum(0))

    def _of_steps(self, sums: torch.Tensor) -> dict[str, float]:
        """`{measure}/step_{index in the schedule}`, or `{measure}/draw_{number}`, of the measures clip_high and
        clip_low (shares), log_ratio_mean and log_ratio_std. sums: `by_step` of all processes, flat.
        """
        by_name: dict[str, torch.Tensor] = {}
        for i, where in self.names.items():
            by_name[where] = by_name.get(where, 0) + sums.view(-1, 5)[i].double()
        found = {}
        for where, own in by_name.items():
            if own[0] > 0:
                high, low, mean, square = (own[1:] / own[0]).tolist()
                measures = {"clip_high": high, "clip_low": low, "log_ratio_mean": mean}
                measures["log_ratio_std"] = max(square - mean**2, 0.0) ** 0.5
                found |= {f"{name}/{where}": value for name, value in measures.items()}
        return found
