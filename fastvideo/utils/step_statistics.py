"""How far each trained step's probability ratios move from 1, and on which side they are clipped."""

from collections.abc import Sequence

from fastvideo.utils.plan import Plan
from fastvideo.utils.sampling_utils import to_device
from fastvideo.utils.transitions import Transition

import torch


class StepStatistics:
    """Sums over the transitions of an iteration, per trained step or draw. The GPU adds; nothing waits for it.

    Attributes:
        sums: [positions, 5]: transitions, clipped above, clipped below, log r, (log r)². Add up over processes.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.names = {i: f"draw_{i}" if plan.draws else f"step_{plan[i].index}" for i in plan.training}
        self.sums = torch.zeros(max(plan.training) + 1, 5, device=device)

    def add(self, batch: Sequence[Transition], parts: dict[str, torch.Tensor]) -> None:
        """Adds the N transitions of a micro-batch. parts: `clip_high`, `clip_low`, `log_ratio`, each [N]."""
        position, counts = (
            to_device(values, self.sums.device)
            for values in ([t.position for t in batch], [float(t.weight > 0) for t in batch])  # 0: added to fill up
        )
        high, low, change = parts["clip_high"], parts["clip_low"], parts["log_ratio"]
        columns = torch.stack([torch.ones_like(change), high, low, change, change**2], 1)
        self.sums.index_add_(0, position, columns * counts[:, None])

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """`{measure}/step_{index in the schedule}`, or `{measure}/draw_{number}`, of the measures clip_high and
        clip_low (shares), log_ratio_mean and log_ratio_std. sums: of all processes, on the CPU.
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
