"""Checks of weights: whether files are whole and hold what a model needs, told by their headers; and finite numbers.

Also reads and writes .safetensors files tensor by tensor.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, Collection[int]]  # name of a weight -> its shape


GGUF = "GGUF holds rounded weights, which can't be trained; give the model in .safetensors"
VARIANTS = ("bf16", "fp16")  # in the names of files, as from_pretrained(variant=...) knows them


def variant_of(folder: Path) -> str | None:
    """The variant of a model's weights, one of VARIANTS, if its folder has no others."""
    found = [v for v in VARIANTS if any(folder.glob(f"*.{v}*.safetensors"))]
    return found[0] if found and not _usual_files(folder, None) else None


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files that hold the weights of the model in a folder, one or several.

    Named as diffusers or transformers name them, or the only one there: a single file of other programs. Empty without
    such files. Raises ValueError, one line, for files that can't be used.
    """
    for variant in (None, *VARIANTS):
        if files := _usual_files(folder, variant):
            return files
    others = sorted(folder.glob("*.safetensors"))
    if len(others) > 1:
        raise ValueError(f"{others[0].name} and {others[1].name} are both in {folder.name}/; leave one model there")
    if not others and (file := next(folder.glob("*.gguf"), None)):
        raise ValueError(f"{file.name}: {GGUF}")
    return others


def _usual_files(folder: Path, variant: str | None) -> list[Path]:
    """`weight_files` under the names of diffusers and transformers."""
    middle = f".{variant}" if variant else ""
    for name in ("diffusion_pytorch_model", "model"):
        index, file = folder / f"{name}.safetensors.index{middle}.json", folder / f"{name}{middle}.safetensors"
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                if not names:
                    raise ValueError("it names no file")
                return [folder / name for name in dict.fromkeys(names)]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index.name} isn't readable: {error!r}") from error
        if file.is_file():
            return [file]
    return []


def stored_shapes(place: Path) -> dict[str, tuple[int, ...]] | None:
    """The shapes of all weights in a .safetensors file or in a model's folder, read from headers. None: no such file.

    Raises ValueError, one line, for a file that is missing, truncated or damaged, or holds rounded weights.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    files = [place] if place.is_file() else weight_files(place)
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no iterator)
                kinds = {name: part.get_dtype() for name, part in slices.items()}
                shapes |= {name: tuple(part.get_shape()) for name, part in slices.items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path.name} is missing or damaged: {' '.join(str(error).split())[:200]}") from error
        if rounded := [name for name, kind in kinds.items() if kind.startswith(("F8", "F4", "I8", "U8"))]:
            problem = f"{path.name} holds rounded weights ({rounded[0]} is {kinds[rounded[0]]}), which can't be trained"
            raise ValueError(f"{problem}; give the model in bf16, fp16 or fp32")
    return shapes if files else None


@contextmanager
def open_weights(place: Path) -> "Iterator[Callable[[str], torch.Tensor]]":
    """A function that reads a weight of a .safetensors file, or of a model's folder, which must be whole."""
    from safetensors import safe_open

    with ExitStack() as stack:
        paths = [place] if place.is_file() else weight_files(place)
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        place = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (no iterator)
        yield lambda name: place[name].get_tensor(name)


def write_weights(path: Path, shapes: Shapes, dtype: "torch.dtype", weight: "Callable[[str], torch.Tensor]") -> None:
    """Writes a .safetensors file whose weights `weight` gives by name, all in `dtype`. Only one is in memory at a time.

    safetensors' own save_file needs all of them at once. The format: 8 bytes with the length of a JSON text, the text
    with each weight's type, shape and place, and the weights.
    """
    import torch

    kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the weights are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = weight(name).to(dtype).contiguous()
            assert tuple(tensor.shape) == tuple(shape), name
            file.write(tensor.view(torch.uint8).numpy())


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
