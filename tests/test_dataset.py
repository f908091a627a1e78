"""The dataset of cached embeddings and the order in which ranks and iterations read it."""

import itertools
import json
import multiprocessing
import subprocess
from pathlib import Path

from fastvideo.dataset.latent_flux_rl_datasets import (
    FOLDERS,
    Draw,
    LatentFluxRLDataset,
    PromptSampler,
    collate,
    outlive_signals,
)

import pytest
import torch


def make_data(folder: Path, lengths: tuple[int, ...] = (4, 4, 4, 4, 4)) -> Path:
    """A prompt.json in the layout of the preprocessing script. The numbers in an embedding identify its prompt."""
    entries = []
    for number, length in enumerate(lengths):
        tensors = (torch.full((length, 6), 1.0 + number), torch.full((3,), 1.0 + number), torch.zeros(length, 3))
        for sub, tensor in zip(FOLDERS.values(), tensors, strict=True):
            (folder / sub).mkdir(parents=True, exist_ok=True)
            torch.save(tensor, folder / sub / f"{number}.pt")
        entries.append(dict.fromkeys(FOLDERS, f"{number}.pt") | {"caption": f"caption {number}"})
    path = folder / "prompt.json"
    path.write_text(json.dumps(entries))
    return path


def stream(iterations: int, *, world_size: int = 1, **kwargs) -> list[list[int]]:
    """The prompts that all ranks read in each iteration, one rank after the other."""
    ranks = [PromptSampler(rank=rank, world_size=world_size, **kwargs) for rank in range(world_size)]
    per_rank = [list(itertools.islice(sampler, iterations)) for sampler in ranks]
    return [[draw.index for part in parts for draw in part] for parts in zip(*per_rank, strict=True)]


def test_items_carry_their_own_tensors_and_caption_and_batches_stack_them(tmp_path):
    dataset = LatentFluxRLDataset(make_data(tmp_path))
    assert len(dataset) == 5
    sampler = PromptSampler(5, 2, seed=3)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    for batch, draws in zip(itertools.islice(loader, 4), sampler, strict=False):
        indices = [draw.index for draw in draws]
        assert batch["index"].tolist() == indices
        assert batch["caption"] == [f"caption {i}" for i in indices]
        assert batch["prompt_embeds"].shape == (2, 4, 6) and batch["text_ids"].shape == (2, 4, 3)
        assert batch["pooled_prompt_embeds"][:, 0].tolist() == [1.0 + i for i in indices]
        assert batch["prompt_embeds"][:, 0, 0].tolist() == [1.0 + i for i in indices]


def test_every_prompt_comes_once_an_epoch_in_a_new_order_without_padding():
    flat = sum(stream(15, num_prompts=10, prompts_per_iteration=4, seed=7), [])
    epochs = [flat[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert flat != sum(stream(15, num_prompts=10, prompts_per_iteration=4, seed=8), [])


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_stream_does_not_depend_on_the_number_of_ranks(world_size):
    settings = {"num_prompts": 10, "prompts_per_iteration": 4, "seed": 7}
    assert stream(9, world_size=world_size, **settings) == stream(9, **settings)


def test_a_resumed_run_reads_the_same_stream():
    settings = {"num_prompts": 10, "prompts_per_iteration": 4, "seed": 7}
    assert stream(4, start_iteration=6, **settings) == stream(9, **settings)[5:]


def test_a_run_resumed_with_another_number_of_prompts_goes_on_where_the_stream_was():
    flat = sum(stream(9, num_prompts=10, prompts_per_iteration=4, seed=7), [])
    rest = stream(4, num_prompts=10, prompts_per_iteration=6, seed=7, start_iteration=4, prompts_before=12)
    assert sum(rest, []) == flat[12:36]
    sampler = PromptSampler(10, 6, start_iteration=4, prompts_before=12)
    assert [sampler.position(i) for i in (4, 5, 6)] == [12, 18, 24] and sampler.epoch_of(6) == 2


def test_more_prompts_an_iteration_than_there_are_run_through_several_epochs():
    assert [sorted(i) for i in stream(2, num_prompts=2, prompts_per_iteration=4, seed=0)] == [[0, 0, 1, 1]] * 2


def test_epoch_is_that_of_the_first_prompt_of_an_iteration():
    sampler = PromptSampler(10, 4)
    assert [sampler.epoch_of(i) for i in (1, 2, 3, 4, 5, 6)] == [0, 0, 0, 1, 1, 2]


def test_prompts_that_cannot_be_dealt_out_evenly_are_refused():
    with pytest.raises(ValueError, match="prompts_per_iteration 3: must be a multiple of the 2 processes"):
        PromptSampler(10, 3, rank=0, world_size=2)


def test_cfg_zeroes_its_share_of_draws_the_same_for_every_layout(tmp_path):
    path = make_data(tmp_path)
    dataset = LatentFluxRLDataset(path, cfg_rate=0.3, seed=1)
    dropped = [bool((dataset[Draw(p % 5, p)]["prompt_embeds"] == 0).all()) for p in range(400)]
    assert 0.23 < sum(dropped) / 400 < 0.37
    again = LatentFluxRLDataset(path, cfg_rate=0.3, seed=1)
    assert [bool((again[Draw(p % 5, p)]["pooled_prompt_embeds"] == 0).all()) for p in range(50)] == dropped[:50]
    other = LatentFluxRLDataset(path, cfg_rate=0.3, seed=2)
    assert [bool((other[Draw(p % 5, p)]["prompt_embeds"] == 0).all()) for p in range(50)] != dropped[:50]
    assert (dataset[0]["prompt_embeds"] == 1).all()
    assert (LatentFluxRLDataset(path)[Draw(0, dropped.index(True))]["prompt_embeds"] == 1).all()
    with pytest.raises(ValueError, match="cfg 1.5"):
        LatentFluxRLDataset(path, cfg_rate=1.5)


def test_embeddings_of_different_length_are_refused_with_both_captions(tmp_path):
    dataset = LatentFluxRLDataset(make_data(tmp_path, lengths=(4, 5)))
    with pytest.raises(ValueError, match=r"shapes \(4, 6\) for 'caption 0' and \(5, 6\) for 'caption 1'"):
        collate([dataset[0], dataset[1]])


def without_key(path: Path) -> None:
    entries = json.loads(path.read_text())
    del entries[3]["caption"]
    path.write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_text("[]"), "expected a list with at least one entry"),
        (lambda path: path.write_text('{"a": 1}'), "expected a list with at least one entry"),
        (lambda path: path.write_text('[{"caption":'), "not a JSON file"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not a JSON file"),
        (lambda path: path.write_text("[3]"), "entry 0 has no text under prompt_embed_path"),
        (without_key, "entry 3 has no text under caption"),
        (lambda path: (path.parent / "text_ids" / "2.pt").unlink(), "1 embedding files are missing, such as .*2.pt"),
    ],
)
def test_a_bad_prompt_json_gives_one_line_that_names_flag_and_file(tmp_path, damage, message):
    path = make_data(tmp_path)
    damage(path)
    with pytest.raises(ValueError, match=rf"^data_json_path .*prompt\.json: {message}.*\)$"):
        LatentFluxRLDataset(path)


def test_a_corrupt_embedding_is_named(tmp_path):
    path = make_data(tmp_path)
    victim = tmp_path / "pooled_prompt_embeds" / "1.pt"
    victim.write_bytes(victim.read_bytes()[:200])
    dataset = LatentFluxRLDataset(path)
    with pytest.raises(ValueError, match=r"^data_json_path .*pooled_prompt_embeds/1\.pt can't be read"):
        dataset[1]
    torch.save(torch.zeros(2, 2), victim)
    with pytest.raises(ValueError, match=r"1\.pt holds no tensor of 1 dimensions"):
        dataset[1]


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_worker_outlives_a_signal_to_all_processes_but_not_its_trainer_s(tmp_path, name):
    dataset, sampler = LatentFluxRLDataset(make_data(tmp_path)), PromptSampler(5, 2)
    batches = iter(
        torch.utils.data.DataLoader(
            dataset, batch_sampler=sampler, collate_fn=collate, num_workers=1, worker_init_fn=outlive_signals
        )
    )
    next(batches)
    (worker,) = multiprocessing.active_children()
    for _ in range(2):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # another process than the trainer
        assert [len(batch["index"]) for batch in itertools.islice(batches, 5)] == [2] * 5
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
