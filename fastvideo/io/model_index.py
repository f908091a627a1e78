"""model_index.json of a pipeline, which names its class. Read before the models' own classes are imported."""

import json
from pathlib import Path
from typing import Any


def model_index(model_path: str) -> dict[str, Any]:
    """What model_index.json says of the pipeline in a folder or on a hub. Empty if nothing can be read.

    From a hub the file alone is fetched, unless it is on this machine or no hub may be asked.
    """
    if Path(model_path).exists():
        file = Path(model_path, "model_index.json")
    elif model_path.count("/") == 1 and not model_path.startswith((".", "/", "~", "data/", "outputs/", "ckpt/")):
        from huggingface_hub import hf_hub_download  # half a second, and most runs have a folder

        try:
            file = Path(hf_hub_download(model_path, "model_index.json"))
        except Exception:  # no network, no licence, no such model: loading the model says which
            return {}
    else:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
