"""Seconds per phase of an iteration, and the share of the device's matrix-product rate that each phase reaches."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastvideo.config import GRPOConfig
from fastvideo.io.waiting import waiting
from fastvideo.models.pretrained import family_of

import torch
from diffusers import ModelMixin

SLOW_PHASE = 1800.0  # seconds after which a phase of an iteration is reported


class Stopwatch:
    """Sums the seconds of laps of work on the device, without waiting for the device between laps."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.rows, self.laps = device.type == "cuda", 0, []

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def lap(self, rows: int) -> Iterator[None]:
        """Times one lap, work on `rows` rows."""
        begin = self._now()
        yield
        self.laps.append((begin, self._now()))
        self.rows += rows

    def read(self) -> tuple[int, float]:
        """Rows and seconds since the last `read`. The device must have finished the work."""
        rows, laps = self.rows, self.laps
        self.rows, self.laps = 0, []
        return rows, sum(begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin for begin, end in laps)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of a large matrix product, measured now."""
    repeats = 20
    size, wait = (8192, torch.cuda.synchronize) if device.type == "cuda" else (256, lambda: None)
    # Random numbers, because a GPU multiplies zeros at a higher clock.
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    for timed in (False, True):  # the first products of a process are slow
        wait()
        start = time.perf_counter()
        for _ in range(repeats if timed else 3):
            torch.mm(a, a)
        wait()
    return repeats * 2 * size**3 / (time.perf_counter() - start)


class Throughput:
    """Times of the current iteration. `prefix` times the rollout steps that have one row per prompt."""

    def __init__(self, config: GRPOConfig, device: torch.device, transformer: ModelMixin) -> None:
        self.config, self.device, self.transformer = config, device, transformer
        compute = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.matmul_rate = matmul_rate(device, compute)
        self.prefix = Stopwatch(device)
        self.begin()

    def begin(self) -> None:
        """Resets all times at the start of an iteration."""
        self.seconds: dict[str, float] = {}
        self.current: str | None = None  # the phase that all time counts for now
        self.start = time.perf_counter()
        self.prefix.read()  # drops the laps of an evaluation

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of a phase. The CPU waits for the GPU only at the end of the phase. A phase within another one
        is a part of that one, and has no time of its own.
        """
        start, outer = time.perf_counter(), self.current
        self.current = outer or name
        # Names the phase if another process leaves this one alone in it.
        with torch.profiler.record_function(name), waiting(f"the end of the phase {name}", SLOW_PHASE):
            yield
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        self.current = outer
        if outer is None:
            key = f"seconds_{name}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start

    def metrics(self, tokens: tuple[int, int], rollout_rows: int, trained_rows: int) -> dict[str, float]:
        """Seconds per phase; TFLOP/s of this process per phase, and their share of `matmul_rate`.

        Rows that are recomputed, or that only pad a batch, don't count. Training costs three forward passes per row;
        with LoRA two, because the base model's weights get no gradient.

        Args:
            tokens: of the picture and of the text. rollout_rows, trained_rows: rows of this process in each phase.
        """
        prefix, self.seconds["seconds_prefix"] = self.prefix.read()  # part of seconds_rollout
        family = family_of(self.config.pretrained_model_name_or_path)
        flops = family.forward_flops(self.transformer, *tokens) / self.config.sp_size
        flops *= 1 + family.guided(self.config.guidance_scale)
        rows = {"rollout": rollout_rows - prefix, "prefix": prefix, "train": trained_rows}
        passes = {"rollout": 1, "prefix": 1, "train": 2 if self.config.use_lora else 3}
        metrics = {}
        for phase, count in rows.items():
            spent = self.seconds[f"seconds_{phase}"]
            spent -= self.seconds["seconds_prefix"] if phase == "rollout" else 0
            if count or phase != "prefix":
                rate = flops * passes[phase] * count / spent
                metrics |= {f"tflops_{phase}": rate / 1e12, f"peak_share_{phase}": rate / self.matmul_rate}
        return metrics | self.seconds | {"seconds_total": time.perf_counter() - self.start} | self._peak_memory()

    def _peak_memory(self) -> dict[str, float]:
        """`gib_peak`: peak memory of tensors on this GPU since the last call. Empty on the CPU."""
        if self.device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return {"gib_peak": peak}
