"""Adapts image-reward 1.5 to today's transformers, which lacks names that the package uses.

The package was written for transformers 4.15 and runs unchanged up to 4.55. In later versions its BERT lacks:

- `modeling_utils.apply_chunking_to_forward`, `prune_linear_layer`: taken from `pytorch_utils`, which still has them.
- `modeling_utils.find_pruneable_heads_and_indices`: replaced by a stub; only head pruning calls it.
- `PreTrainedModel.get_head_mask`, `invert_attention_mask`: added to the package's own BERT.
- `PreTrainedModel.all_tied_weights_keys` before `post_init`: an empty dict, because this BERT ties no weights.
- `tokenizer.additional_special_tokens_ids`: `bert_tokenizer` below asks for the token's id by name instead.

Nothing that exists is replaced, except `init_tokenizer`, which here also takes a local `bert-base-uncased` folder. The
package's top level imports its ReFL trainer, and with it diffusers and datasets; an empty module takes its place.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fastvideo.models.reward_model.loading import check_tokenizer

import torch


def _add_missing_imports() -> None:
    from transformers import modeling_utils, pytorch_utils

    def no_pruning(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("head pruning is not supported with this version of transformers")

    for name in ("apply_chunking_to_forward", "prune_linear_layer", "find_pruneable_heads_and_indices"):
        if not hasattr(modeling_utils, name):
            setattr(modeling_utils, name, getattr(pytorch_utils, name, no_pruning))


def _get_head_mask(self: torch.nn.Module, head_mask: None, num_hidden_layers: int) -> list[None]:
    if head_mask is not None:
        raise NotImplementedError("head masks are not supported with this version of transformers")
    return [None] * num_hidden_layers


def _invert_attention_mask(self: torch.nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """Mask [B, L] or [B, Q, L] of 1 (attend) and 0 (ignore) -> additive mask [B, 1, 1 or Q, L] of 0 and the minimum."""
    mask = (mask[:, None] if mask.dim() == 3 else mask[:, None, None]).to(self.dtype)
    return (1.0 - mask) * torch.finfo(self.dtype).min


def _add_missing_methods(bert: type) -> None:
    missing = {
        "get_head_mask": _get_head_mask,
        "invert_attention_mask": _invert_attention_mask,
        "all_tied_weights_keys": {},
    }
    for name, value in missing.items():
        if not hasattr(bert, name):
            setattr(bert, name, value)


def bert_tokenizer(source: str) -> Any:
    """BLIP's tokenizer: bert-base-uncased (a hub name or a folder with vocab.txt) plus [DEC] and [ENC]."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(source)
    check_tokenizer(tokenizer, source)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    return tokenizer


def import_image_reward(tokenizer_source: str = "bert-base-uncased") -> ModuleType:
    """The `ImageReward` package, adapted to the installed transformers, with its tokenizer loaded from the source."""
    _add_missing_imports()
    sys.modules.setdefault("ImageReward.ReFL", ModuleType("ImageReward.ReFL"))
    package = importlib.import_module("ImageReward")
    importlib.import_module("ImageReward.models.BLIP.blip_pretrain").init_tokenizer = lambda: bert_tokenizer(
        tokenizer_source
    )
    _add_missing_methods(importlib.import_module("ImageReward.models.BLIP.med").BertPreTrainedModel)
    return package


def tokenizer_source(score_dir: str | Path) -> str:
    """The folder `bert-base-uncased` in score_dir if it exists (no network needed), else the hub name."""
    local = Path(score_dir) / "bert-base-uncased"
    return str(local) if local.is_dir() else "bert-base-uncased"
