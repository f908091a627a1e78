"""Checks of weights: whether files are whole and hold what a model needs, told by their headers; and finite numbers."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, Collection[int]]  # name of a weight -> its shape


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files that from_pretrained of diffusers or transformers would load from the folder of a model.

    Empty without such files. Raises ValueError, one line, for an index of several files that can't be read.
    """
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                if not names:
                    raise ValueError("it names no file")
                return [folder / name for name in dict.fromkeys(names)]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index.name} isn't readable: {error!r}") from error
        if (folder / name).is_file():
            return [folder / name]
    return []


def stored_shapes(place: Path) -> dict[str, tuple[int, ...]] | None:
    """The shapes of all weights in a .safetensors file or in a model's folder, read from headers. None: no such file.

    Raises ValueError, one line, for a file that is missing, truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    files = [place] if place.is_file() else weight_files(place)
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path.name} is missing or damaged: {' '.join(str(error).split())[:200]}") from error
    return shapes if files else None


def mismatch(wanted: Shapes, stored: Shapes) -> str | None:
    """How stored weights differ from those that a model needs, in words; None if they don't."""
    missing, unknown = ([k for k in a if k not in b] for a, b in ((wanted, stored), (stored, wanted)))
    other = [k for k in wanted if k in stored and tuple(wanted[k]) != tuple(stored[k])]
    problems = [f"{names[0]} {what}" for names, what in ((missing, "is missing"), (unknown, "is unknown")) if names]
    problems += [f"{k} has shape {tuple(stored[k])}, expected {tuple(wanted[k])}" for k in other[:1]]
    more = len(missing) + len(unknown) + len(other) - len(problems)
    return (", ".join(problems) + (f", and {more} more" if more else "")) or None


def loading_problem(model: "torch.nn.Module", report: Mapping[str, Any], strict: bool) -> str | None:
    """What is wrong with weights that from_pretrained has loaded; None if nothing is.

    diffusers and transformers only warn of missing weights, and fill them with random numbers.

    Args:
        report: from `output_loading_info=True`. strict: unknown weights are wrong even if none is missing.
    """
    wanted, stored = (dict.fromkeys(sorted(report[kind]), ()) for kind in ("missing_keys", "unexpected_keys"))
    for name, shape, expected in report["mismatched_keys"]:
        wanted[name], stored[name] = expected, shape
    problem = mismatch(wanted, stored) if wanted or strict else None
    if problem is None and (name := not_finite(model.state_dict())):
        problem = f"{name} has values that aren't finite"
    return problem


def not_finite(weights: "Mapping[str, torch.Tensor]") -> str | None:
    """The name of the first weight with NaN or infinite values, if any. Needs no memory beside the weights."""
    import torch

    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            return name
    return None
