"""model_index.json of a pipeline, which names its class. Read before the models' own classes are imported."""

import json
from functools import cache
from pathlib import Path
from typing import Any


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

    From a hub the file alone is fetched, unless it is on this machine or no hub may be asked.
    """
    if Path(model_path).exists():
        file = Path(model_path, "model_index.json")
    elif model_path.count("/") == 1 and not model_path.startswith((".", "/", "~", "data/", "outputs/", "ckpt/")):
        cached = _on_hub(model_path)
        if cached is None:
            return {}
        file = Path(cached)
    else:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
