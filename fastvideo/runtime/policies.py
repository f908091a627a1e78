"""Copies of the trained parameters: their average, the old policy, the reference. Sharded like the parameters.

With LoRA only adapters are trained, so a copy is a second set of adapters, not a second model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from fastvideo.config import CURRENT, EMA, OLD_POLICY, REFERENCE, GRPOConfig
from fastvideo.runtime.engines import Engine

from diffusers.training_utils import EMAModel


class Policies:
    """The copies that a run needs (`GRPOConfig.copies`).

    EMA: average over optimizer steps, saved for sampling. OLD_POLICY: average over iterations. REFERENCE: the base
    model, or what training had reached at the last --ref_reset_steps.

    Attributes:
        reference_moved: whether the reference is no longer the base model.
    """

    def __init__(self, config: GRPOConfig, engine: Engine) -> None:
        self.config, self.engine, self.reference_moved = config, engine, False
        parameters, decays = engine.trained_parameters(), {EMA: config.ema_decay, OLD_POLICY: config.old_policy_decay}
        self.copies = {name: EMAModel(parameters, decay=decays.get(name, 0.0)) for name in config.copies}

    @contextmanager
    def acting(self, name: str) -> Iterator[None]:
        """Inside, the model has the parameters of a copy; with CURRENT, its own. All processes enter it together."""
        if name == CURRENT:
            yield
            return
        self._swap(self.copies[name])
        try:
            yield
        finally:
            self._swap(self.copies[name])

    def _swap(self, copy: EMAModel) -> None:
        self.engine.drop_gathered()
        for parameter, other in zip(self.engine.trained_parameters(), copy.shadow_params, strict=True):
            keep = parameter.detach().clone()
            parameter.data.copy_(other)
            other.copy_(keep)

    def to_save(self) -> dict[str, int]:
        """Copies that a checkpoint must hold -> number of their updates. The base model is on disk already."""
        names = [name for name in self.copies if name != REFERENCE or self.reference_moved]
        return {name: self.copies[name].optimization_step for name in names}

    def after_step(self, iteration: int) -> None:
        """Call after each optimizer step of an iteration (1, 2, …)."""
        if EMA in self.copies and iteration > self.config.ema_start_step:
            self.engine.drop_gathered()
            self.copies[EMA].step(self.engine.trained_parameters())

    def after_iteration(self, iteration: int) -> None:
        """Call after the last optimizer step of an iteration."""
        self.engine.drop_gathered()
        if OLD_POLICY in self.copies:
            self.copies[OLD_POLICY].step(self.engine.trained_parameters())
        if self.config.ref_reset_steps and iteration % self.config.ref_reset_steps == 0:
            for copy, parameter in zip(
                self.copies[REFERENCE].shadow_params, self.engine.trained_parameters(), strict=True
            ):
                copy.copy_(parameter.detach())
            self.reference_moved = True
