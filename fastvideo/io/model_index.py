"""model_index.json of a pipeline, which names its class. Read before the models' own classes are imported."""

import json
from functools import cache
from pathlib import Path
from typing import Any

# Pipelines that the recipes name. Their plans can be shown before they are here.
PUBLISHED = {
    **dict.fromkeys(("data/flux", "black-forest-labs/FLUX.1-dev"), "FluxPipeline"),
    **dict.fromkeys(("data/flux2_klein", "black-forest-labs/FLUX.2-klein-base-4B"), "Flux2KleinPipeline"),
}


def _on_hub(model_path: str) -> str | None:
    """The file's path on this machine, fetched if need be. None: no hub gives it."""
    from huggingface_hub import try_to_load_from_cache  # half a second, and most runs have a folder
    from huggingface_hub.errors import HFValidationError

    try:
        there = try_to_load_from_cache(model_path, "model_index.json")
    except HFValidationError:
        return None
    return there if isinstance(there, str) else _fetched(model_path)


@cache  # without a network, each try takes a minute
def _fetched(model_path: str) -> str | None:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(model_path, "model_index.json")
    except Exception:  # no network, no licence, no such model: loading the model says which
        return None


def model_index(model_path: str) -> dict[str, Any]:
    """What model_index.json says of the pipeline in a folder or on a hub. Empty if nothing can be read.

    From a hub the file alone is fetched, unless it is on this machine or no hub may be asked. The class alone for
    pipelines in PUBLISHED that can't be had.
    """
    name = PUBLISHED.get(model_path.rstrip("/"))
    unread = {"_class_name": name} if name else {}
    if Path(model_path).exists():
        file = Path(model_path, "model_index.json")
    elif model_path.count("/") == 1 and not model_path.startswith((".", "/", "~", "data/", "outputs/", "ckpt/")):
        cached = _on_hub(model_path)
        if cached is None:
            return unread
        file = Path(cached)
    else:
        return unread
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
