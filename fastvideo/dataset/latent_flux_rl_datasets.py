"""The prompt embeddings that `preprocess_flux_embedding.py` has cached, and the order in which training reads them.

dataset = LatentFluxRLDataset("data/rl_embeddings/prompt.json")
sampler = PromptSampler(len(dataset), prompts_per_iteration=8, rank=0, world_size=1, seed=7144)
for batch in read_ahead(dataset, sampler, threads=4, device=torch.device("cpu")): ...
"""

import bisect
import copy
import functools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fastvideo.cli import FlagError
from fastvideo.dataset.split import held_out
from fastvideo.io.prompts import WEIGHT, checked_weight
from fastvideo.io.waiting import result_of
from fastvideo.io.words import counted

import numpy as np
import torch

# Key in prompt.json -> folder of its files. Models without a pooled embedding have no files of it.
FOLDERS = {
    "prompt_embed_path": "prompt_embed",
    "pooled_prompt_embeds_path": "pooled_prompt_embeds",
    "text_ids": "text_ids",
}
HINT = "(scripts/preprocess/preprocess_flux_rl_embeddings.sh makes it from a prompt file)"
TENSORS = ("prompt_embeds", "pooled_prompt_embeds", "text_ids")  # in the order of FOLDERS
POOLED, NEGATIVE = "pooled_prompt_embeds_path", "negative_prompt_embed_path"  # keys that not all models have
AT_ONCE = 4096  # prompts whose embeddings are checked when a run starts; 100,000 take minutes
READ_LIMIT = 1800.0  # seconds to read the prompts of one iteration; only a file system that is gone needs more


class Draw(NamedTuple):
    """One prompt of the training stream: index in prompt.json, and place in the stream of all ranks (from 0)."""

    index: int
    position: int


def read_index(path: Path, field: str = "data_json_path") -> list[dict[str, Any]]:
    """The entries of prompt.json, or of a reference's videos2caption.json: FOLDERS' keys and `caption`, all texts.

    An entry may have `metadata`, an object: what the prompt file says about the prompt. It may have a `weight`, see
    PromptSampler. Models with classifier-free guidance add NEGATIVE, the file in prompt_embed/ of the empty prompt, the
    same in all entries.

    Raises FlagError about the setting `field` for a missing or malformed file, and for an empty list.
    """

    def error(problem: str) -> FlagError:
        return FlagError(field, path, f"{problem} {HINT}")

    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(entries, ensure_ascii=False).encode()  # half a pair of UTF-16 could be written nowhere
    except OSError as cause:
        raise error(cause.strerror or str(cause)) from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"not a JSON file: {cause}") from cause
    if not isinstance(entries, list) or not entries:
        raise error("expected a list with at least one entry")
    for number, entry in enumerate(entries):
        values = entry if isinstance(entry, dict) else {}
        keys = [key for key in (*FOLDERS, "caption") if key != POOLED] + [k for k in (POOLED, NEGATIVE) if k in values]
        missing = [key for key in keys if not isinstance(values.get(key), str)]
        if missing:
            raise error(f"entry {number} has no text under {', '.join(missing)}")
        if not isinstance(entry.get("metadata", {}), dict):
            raise error(f"entry {number} has metadata that is no object")
        try:
            checked_weight(entry.get(WEIGHT, 1), f"entry {number}")
        except ValueError as cause:
            raise error(f"{cause}") from cause
    return entries


class LatentFluxRLDataset(torch.utils.data.Dataset):
    """Prompt embeddings on disk, also those that MixGRPO and DanceGRPO have cached.

    Args:
        json_path: prompt.json or videos2caption.json, with the three folders beside it.
        cfg_rate: the share of draws whose embeddings are replaced by zeros, 0 to 1. Whether a draw's embeddings are
            replaced depends only on `seed` and the draw's position in the stream, not on ranks, workers or a restart.
            An item asked for by a plain index is never replaced.
        widths: last dimension of each tensor that the transformer takes (`Family.widths`): checks the embeddings, of
            AT_ONCE prompts at once and else of those that are drawn. None: only checks that the files are there.

    Raises:
        FlagError: a missing or malformed file, an empty list, or an embedding that isn't there or can't be used.
    """

    def __init__(
        self, json_path: str | Path, cfg_rate: float = 0.0, seed: int = 0, widths: Mapping[str, int] | None = None
    ) -> None:
        self.json_path, self.cfg_rate, self.seed = Path(json_path), cfg_rate, seed
        if not 0 <= cfg_rate <= 1:
            raise FlagError("cfg", cfg_rate, "must be between 0 and 1")
        self.entries = read_index(self.json_path)
        absent = [path for entry in self.entries for path in self._paths(entry) if not os.path.isfile(path)]
        if absent:
            raise self._error(f"{counted(len(absent), 'embedding file')} can't be found, such as {absent[0]}")
        self.widths, self._check_draws = widths, False
        if widths:
            self._check_some()

    @property
    def weights(self) -> list[float]:
        """How often training takes each prompt, see PromptSampler."""
        return [float(entry.get(WEIGHT, 1)) for entry in self.entries]

    def split(self, amount: float) -> "tuple[LatentFluxRLDataset, LatentFluxRLDataset]":
        """The prompts to train on, and those that `held_out` holds out. Raises FlagError if one of them has none."""
        training, judged = copy.copy(self), copy.copy(self)
        out = held_out([entry["caption"] for entry in self.entries], amount)
        training.entries = [entry for entry, is_out in zip(self.entries, out, strict=True) if not is_out]
        judged.entries = [entry for entry, is_out in zip(self.entries, out, strict=True) if is_out]
        return training, judged

    def _error(self, problem: str) -> FlagError:
        return FlagError("data_json_path", self.json_path, f"{problem} {HINT}")

    def _paths(self, entry: dict[str, Any]) -> list[Path]:
        paths = [self.json_path.parent / folder / entry[key] for key, folder in FOLDERS.items() if key in entry]
        return [*paths, self._negative(entry)] if NEGATIVE in entry else paths

    def _negative(self, entry: dict[str, Any]) -> Path:
        return self.json_path.parent / FOLDERS["prompt_embed_path"] / entry[NEGATIVE]

    @property
    def negative_prompt_embeds(self) -> torch.Tensor:
        """The embedding of the empty prompt [L, D]. Raises FlagError if there is none that can be used."""
        entry = self.entries[0]
        if NEGATIVE not in entry:
            problem = "no embedding of the empty prompt, which guidance above 1 needs; preprocess again with this model"
            raise self._error(problem)
        return self._tensor("prompt_embeds", self._negative(entry))

    def _check_some(self) -> None:
        """Checks the embeddings of up to AT_ONCE prompts, evenly spread; the others are checked when they are drawn."""
        self._first = self._read(self.entries[0], mmap=True)
        # Where T5's embeddings take more than 2 GiB, only the first and the last token are tested for finite values.
        self._large = sum(self._paths(entry)[0].stat().st_size for entry in self.entries) > 2**31
        step = -(-len(self.entries) // AT_ONCE)
        for entry in self.entries[::step]:
            self._check(self._read(entry, mmap=True))
        self._check_draws = step > 1

    def _check(self, item: dict[str, Any]) -> None:
        """Raises FlagError for an embedding that isn't finite, or has not the first one's length or the widths."""
        first, caption = self._first, item["caption"]
        embeds, pooled = item["prompt_embeds"], item.get("pooled_prompt_embeds")
        model = "the transformer of --pretrained_model_name_or_path"
        for name in TENSORS:
            wanted, found = self.widths.get(name, 0), item[name].shape[-1] if name in item else 0
            if found != wanted:
                what = {"prompt_embeds": "prompt embedding", "pooled_prompt_embeds": "pooled embedding"}.get(name, name)
                problem = f"the {what} of {caption!r} is {found} wide, {model} takes {wanted}"
                raise self._error(f"{problem}: it was made with another model; preprocess with this one")
        if len(embeds) != len(first["prompt_embeds"]):
            lengths = " and ".join(f"{len(x['prompt_embeds'])} for {x['caption']!r}" for x in (first, item))
            raise self._error(f"different numbers of tokens, {lengths}; preprocess with one --max_sequence_length")
        if not torch.equal(item["text_ids"].float(), first["text_ids"].float()):
            raise self._error(f"the text ids of {first['caption']!r} and {caption!r} differ")
        tested = embeds[:: max(1, len(embeds) - 1)] if self._large else embeds
        if not all(x.float().isfinite().all() for x in (tested, pooled) if x is not None):
            raise self._error(f"the embedding of {caption!r} has values that aren't finite; preprocess it again")

    def _read(self, entry: dict[str, Any], mmap: bool = False) -> dict[str, Any]:
        """One prompt: prompt_embeds [L, D], pooled_prompt_embeds [D'] if the model has it, text_ids [L, axes of
        positions], caption, metadata.

        A first dimension of 1 is taken away. Text ids of FLUX are 0: for text ids [3], which the references store, all
        tokens get them.
        """
        item: dict[str, Any] = {"caption": entry["caption"], "metadata": entry.get("metadata", {})}
        for name, key in zip(TENSORS, FOLDERS, strict=True):
            if key in entry:
                path = self.json_path.parent / FOLDERS[key] / entry[key]
                item[name] = self._tensor(name, path, mmap, tokens=len(item.get("prompt_embeds", ())))
        if len(item["text_ids"]) != len(item["prompt_embeds"]):
            problem = f"has {len(item['prompt_embeds'])} tokens, its text_ids are {list(item['text_ids'].shape)}"
            raise self._error(f"{self._paths(entry)[0]} {problem}; preprocess again")
        return item

    def _tensor(self, name: str, path: Path, mmap: bool = False, tokens: int = 0) -> torch.Tensor:
        """One of TENSORS from its file. tokens: of the prompt, for text ids."""
        try:
            tensor = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
        except Exception as error:  # torch raises half a dozen types for a damaged file
            cause = str(error).partition("\n")[0]
            raise self._error(f"{path} can't be read; delete it and preprocess again: {cause}") from error
        dims = 1 if name == "pooled_prompt_embeds" else 2
        fits = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        fits = fits and (tensor.is_floating_point() or name == "text_ids")
        if fits and tensor.ndim == dims + 1 and len(tensor) == 1:
            tensor = tensor[0]
        if fits and name == "text_ids" and tensor.shape in ((3,), (1, 3)) and not tensor.any():
            tensor = tensor.expand(tokens, 3)
        if not fits or tensor.ndim != dims or 0 in tensor.shape:
            is_tensor = isinstance(tensor, torch.Tensor)
            what = f"{tensor.dtype} {list(tensor.shape)}" if is_tensor else type(tensor).__name__
            raise self._error(f"{path} holds no tensor of {dims} dimensions ({what}); delete it and preprocess again")
        return tensor

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, draw: "int | Draw") -> dict[str, Any]:
        """One prompt as `_read` gives it, and its index.

        Raises FlagError, naming the file, for an embedding that can't be read or has another shape.
        """
        index, position = draw if isinstance(draw, tuple) else (draw, None)
        entry = self.entries[index]
        item = self._read(entry) | {"index": index}
        if self._check_draws:
            self._check(item)
        if position is not None and np.random.default_rng([self.seed, position]).random() < self.cfg_rate:
            for name in {"prompt_embeds", "pooled_prompt_embeds"} & item.keys():
                item[name] = torch.zeros_like(item[name])
        return item


def draws_per_epoch(weights: Sequence[float]) -> np.ndarray:
    """The mean number of draws of each prompt [N] per epoch: its weight, if the largest is at least 1.

    Else only ratios were meant, such as probabilities: all weights are divided by the largest. Raises ValueError if no
    weight is above 0.
    """
    found = np.asarray(weights, dtype=np.float64)
    if not found.max() > 0:
        raise ValueError("no prompt has a weight above 0")
    return found / min(1.0, found.max())


class PromptSampler(torch.utils.data.Sampler):
    """Batch sampler: for each iteration, from `start_iteration` on and without end, this rank's list of draws.

    The stream of all ranks is one random permutation of the prompts per epoch, drawn from (seed, epoch). Each iteration
    takes the next `prompts_per_iteration` prompts, and rank r the r-th contiguous block of them. So each prompt comes
    once per epoch, nothing is padded, and neither the number of ranks nor a resume changes the stream.

    A prompt of weight w comes w times per epoch (see `draws_per_epoch`): ⌊e·w + u⌋ times in the first e epochs, where
    u in [0, 1) is drawn once from (seed, prompt). So an epoch has it ⌊w⌋ or ⌈w⌉ times, and after any number of epochs
    it is less than one draw away from its share; weight 0 never comes.

    Args:
        weights: of each prompt, at least 0. None: 1.
        prompts_before: prompts of the stream that iterations before `start_iteration` took. None: as many per iteration
            as from now on.

    Raises:
        FlagError: the prompts of an iteration can't be dealt out evenly to the ranks.
    """

    def __init__(
        self,
        num_prompts: int,
        prompts_per_iteration: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_iteration: int = 1,
        prompts_before: int | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        if num_prompts < 1 or start_iteration < 1 or not 0 <= rank < world_size:
            raise ValueError(f"{num_prompts=} {start_iteration=} {rank=} {world_size=}: impossible")
        if prompts_per_iteration < 1 or prompts_per_iteration % world_size:
            problem = f"must be a multiple of the {world_size} processes"
            raise FlagError("prompts_per_iteration", prompts_per_iteration, problem)
        self.num_prompts, self.prompts_per_iteration = num_prompts, prompts_per_iteration
        self.rank, self.world_size, self.seed, self.start_iteration = rank, world_size, seed, start_iteration
        self.prompts_before = (
            (start_iteration - 1) * prompts_per_iteration if prompts_before is None else prompts_before
        )
        times = draws_per_epoch([1.0] * num_prompts if weights is None else weights)
        self._per_epoch, self._whole, self._part = float(times.sum()), *np.divmod(times, 1)  # apart: whole is exact
        self._start = np.random.default_rng([seed, 0, 1]).random(num_prompts)
        self._order = functools.lru_cache(maxsize=2)(self._permutation)  # an iteration may lie across two epochs
        self._before = functools.lru_cache(maxsize=256)(lambda epoch: int(self._times(epoch).sum()))

    def _times(self, epochs: int) -> np.ndarray:
        """How often each prompt [N] has come after so many epochs."""
        return (epochs * self._whole + np.floor(epochs * self._part + self._start)).astype(np.int64)

    def _permutation(self, epoch: int) -> np.ndarray:
        members = np.repeat(np.arange(self.num_prompts), self._times(epoch + 1) - self._times(epoch))
        return np.random.default_rng([self.seed, epoch]).permutation(members)

    def _epoch(self, position: int) -> int:
        """The epoch of a place in the stream."""
        enough = int((position + self.num_prompts) / self._per_epoch) + 2  # epochs, which together reach beyond it
        return bisect.bisect_right(range(enough), position, key=self._before) - 1

    def epoch_of(self, iteration: int) -> int:
        """The epoch, from 0, in which iteration `iteration` (from 1) begins; also for iteration 0, the start."""
        return self._epoch(max(self.position(iteration), 0))

    def position(self, iteration: int) -> int:
        """Number of prompts of the stream that earlier iterations took when iteration `iteration` begins."""
        return self.prompts_before + (iteration - self.start_iteration) * self.prompts_per_iteration

    def draws(self, iteration: int) -> list[Draw]:
        """This rank's prompts in iteration `iteration` (from 1)."""
        local = self.prompts_per_iteration // self.world_size
        first = self.position(iteration) + self.rank * local
        epochs = ((position, self._epoch(position)) for position in range(first, first + local))
        return [Draw(int(self._order(epoch)[place - self._before(epoch)]), place) for place, epoch in epochs]

    def __iter__(self) -> Iterator[list[Draw]]:
        iteration = self.start_iteration
        while True:
            yield self.draws(iteration)
            iteration += 1


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks P items.

    Returns prompt_embeds [P, L, D], pooled_prompt_embeds [P, D'], text_ids [P, L, axes], index [P], and the lists of P
    captions, `caption`, and of P objects, `metadata`.
    Raises FlagError if their embeddings differ in shape.
    """
    first = items[0]
    names = [name for name in TENSORS if name in first]
    for name in names:
        for item in items[1:]:
            if item[name].shape != first[name].shape:
                shapes = " and ".join(f"{tuple(x[name].shape)} for {x['caption']!r}" for x in (first, item))
                same = "preprocess all prompts with one model and one --max_sequence_length"
                raise FlagError("data_json_path", None, f"{name} has the shapes {shapes}; {same}")
    return {
        **{name: torch.stack([item[name] for item in items]) for name in names},
        "index": torch.tensor([item["index"] for item in items]),
        **{name: [item[name] for item in items] for name in ("caption", "metadata")},
    }


def read_ahead(
    dataset: LatentFluxRLDataset, sampler: Iterable[list[Draw]], threads: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """The batches of the sampler's draws, in order, without end. Each thread reads one batch ahead (0: none does).

    Threads, because prompts are small and reading them is waiting for the disk: no copies in /dev/shm, which may be too
    small, and no processes that a signal or the system may end. For a GPU the batches lie in pinned memory.

    Raises:
        WaitedTooLong: a batch could not be read within READ_LIMIT.
    """

    def read(draws: list[Draw]) -> dict[str, Any]:
        batch = collate([dataset[draw] for draw in draws])
        if device.type == "cuda":
            return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        return batch

    if not threads:
        yield from map(read, sampler)
    start = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
    pool, draws = ThreadPoolExecutor(threads, "reader", **start), iter(sampler)
    try:
        ahead = deque(pool.submit(read, next(draws)) for _ in range(threads))
        while True:
            ahead.append(pool.submit(read, next(draws)))
            yield result_of(ahead.popleft(), f"embeddings beside {dataset.json_path}", READ_LIMIT)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
