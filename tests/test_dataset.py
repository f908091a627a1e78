"""The dataset of cached embeddings and the order in which ranks and iterations read it."""

import itertools
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from fastvideo import train_grpo_flux
from fastvideo.dataset import latent_flux_rl_datasets
from fastvideo.dataset.latent_flux_rl_datasets import (
    FOLDERS,
    Draw,
    LatentFluxRLDataset,
    PromptSampler,
    collate,
    read_ahead,
)
from fastvideo.io.waiting import WaitedTooLong

import numpy as np
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
    batches = read_ahead(dataset, sampler, 1, torch.device("cpu"))
    for batch, draws in zip(itertools.islice(batches, 4), sampler, strict=False):
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


@pytest.mark.parametrize("weights", [None, [1.0] * 10, [0.2] * 10])
def test_equal_weights_leave_each_epoch_the_permutation_of_its_seed_and_number(weights):
    flat = sum(stream(15, num_prompts=10, prompts_per_iteration=4, seed=7, weights=weights), [])
    assert flat == sum((np.random.default_rng([7, epoch]).permutation(10).tolist() for epoch in range(6)), [])


def test_a_prompt_comes_as_often_as_its_weight_says_in_every_epoch_and_over_all_of_them():
    weights, epochs = np.array([0, 0.3, 1, 2.5, 0.05, 4]), 200
    sampler = PromptSampler(6, 1, seed=3, weights=weights)
    counts = np.zeros((epochs + 1, 6))
    for iteration in itertools.count(1):
        (draw,) = sampler.draws(iteration)
        if (epoch := sampler.epoch_of(iteration)) > epochs:
            break
        counts[epoch, draw.index] += 1
    counts = counts[:epochs]
    assert (np.floor(weights) <= counts).all() and (counts <= np.ceil(weights)).all()
    assert (abs(counts.cumsum(0) - weights * np.arange(1, epochs + 1)[:, None]) < 1).all()


def test_small_weights_are_ratios_and_large_numbers_of_prompts_cost_little():
    """Probabilities that sum to 1 would make epochs of one draw."""
    shares = [0.4, 0.1, 0.5]
    flat = sum(stream(90, num_prompts=3, prompts_per_iteration=1, weights=shares), [])
    assert flat == sum(stream(90, num_prompts=3, prompts_per_iteration=1, weights=[0.8, 0.2, 1]), [])
    many = PromptSampler(100_000, 32, weights=[1e-3] * 99_999 + [1], start_iteration=10**6)
    assert sum(draw.index == 99_999 for i in range(10**6, 10**6 + 10) for draw in many.draws(i)) in (3, 4)


WEIGHTS = [None, [0.5, 0, 3, 1, 1, 0.25, 1, 1.5, 1, 2]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_stream_does_not_depend_on_the_number_of_ranks(world_size, weights):
    settings = {"num_prompts": 10, "prompts_per_iteration": 4, "seed": 7, "weights": weights}
    assert stream(9, world_size=world_size, **settings) == stream(9, **settings)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_resumed_run_reads_the_same_stream(weights):
    settings = {"num_prompts": 10, "prompts_per_iteration": 4, "seed": 7, "weights": weights}
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


def change(path: Path, number: int, folder: str, new: Callable[[torch.Tensor], object]) -> None:
    file = path.parent / folder / f"{number}.pt"
    torch.save(new(torch.load(file, weights_only=True)), file)


WIDTHS = {"prompt_embeds": 6, "pooled_prompt_embeds": 3, "text_ids": 3}


def test_embeddings_of_the_references_are_read_in_any_layout_whose_meaning_is_certain(tmp_path):
    path = make_data(tmp_path)
    expected = collate([LatentFluxRLDataset(path)[i] for i in range(5)])
    change(path, 0, "text_ids", lambda ids: ids[0].clone())  # MixGRPO and DanceGRPO store one row of the text ids
    change(path, 1, "text_ids", lambda ids: ids[None].long())
    change(path, 2, "prompt_embed", lambda embeds: embeds[None].half())
    change(path, 3, "prompt_embed", lambda embeds: embeds.bfloat16())
    change(path, 4, "pooled_prompt_embeds", lambda pooled: pooled[None].bfloat16())
    index = path.rename(path.with_name("videos2caption.json"))
    found = collate([LatentFluxRLDataset(index, widths=WIDTHS)[i] for i in range(5)])
    for name in ("prompt_embeds", "pooled_prompt_embeds", "text_ids"):
        assert torch.equal(found[name].float(), expected[name]), name


@pytest.mark.parametrize(
    ("folder", "new", "problem"),
    [
        ("prompt_embed", lambda x: x[:3], "4 for 'caption 0' and 3 for 'caption 1'|has 3 tokens"),
        ("prompt_embed", lambda x: x[:, :5], "prompt embedding of 'caption 1' is 5 wide, the transformer .* takes 6"),
        ("pooled_prompt_embeds", lambda x: x[:2], "pooled embedding of 'caption 1' is 2 wide, .* takes 3"),
        ("prompt_embed", lambda x: x[None].expand(2, 4, 6), r"1.pt holds no tensor of 2 dimensions .*\[2, 4, 6\]"),
        ("prompt_embed", lambda x: x.long(), "1.pt holds no tensor of 2 dimensions .*int64"),
        ("prompt_embed", lambda x: {"embeds": x}, "1.pt holds no tensor of 2 dimensions .*dict"),
        ("prompt_embed", lambda x: x.to_sparse(), "1.pt holds no tensor of 2 dimensions"),
        ("prompt_embed", lambda x: x[:0], "1.pt holds no tensor of 2 dimensions"),
        ("prompt_embed", lambda x: x.index_fill(0, torch.tensor([2]), torch.nan), "'caption 1' has values that aren't"),
        ("pooled_prompt_embeds", lambda x: x / 0, "'caption 1' has values that aren't finite"),
        ("text_ids", lambda x: x[0] + 1, "1.pt holds no tensor of 2 dimensions"),
        ("text_ids", lambda x: x[:3], r"has 4 tokens, its text_ids are \[3, 3\]"),
        ("text_ids", lambda x: x + 1, "the text ids of 'caption 0' and 'caption 1' differ"),
        ("text_ids", lambda x: Path("code"), "1.pt can't be read"),
    ],
)
def test_an_embedding_that_cannot_be_used_is_refused_when_the_data_is_opened(tmp_path, folder, new, problem):
    path = make_data(tmp_path)
    change(path, 1, folder, new)
    with pytest.raises(ValueError, match=f"^data_json_path {path}: .*({problem})") as refusal:
        LatentFluxRLDataset(path, widths=WIDTHS)
    assert "\n" not in str(refusal.value)


def test_of_many_embeddings_some_are_checked_at_once_and_the_others_when_they_are_drawn(tmp_path, monkeypatch):
    path = make_data(tmp_path)
    for number in (1, 3):
        change(path, number, "prompt_embed", lambda x: x / 0)
    monkeypatch.setattr(latent_flux_rl_datasets, "AT_ONCE", 3)
    dataset = LatentFluxRLDataset(path, widths=WIDTHS)
    assert [dataset[number]["index"] for number in (0, 2, 4)] == [0, 2, 4]
    for number in (1, 3):
        with pytest.raises(ValueError, match=f"'caption {number}' has values that aren't finite"):
            dataset[Draw(number, 7)]
    change(path, 2, "prompt_embed", lambda x: x / 0)
    with pytest.raises(ValueError, match="'caption 2' has values that aren't finite"):
        LatentFluxRLDataset(path, widths=WIDTHS)


def test_embeddings_of_different_length_are_refused_with_both_captions(tmp_path):
    path = make_data(tmp_path, lengths=(4, 5))
    with pytest.raises(ValueError, match=r"4 for 'caption 0' and 5 for 'caption 1'; preprocess with one --max_seq"):
        LatentFluxRLDataset(path, widths=WIDTHS)
    dataset = LatentFluxRLDataset(path)
    with pytest.raises(ValueError, match=r"shapes \(4, 6\) for 'caption 0' and \(5, 6\) for 'caption 1'"):
        collate([dataset[0], dataset[1]])


def test_training_uses_cached_embeddings_of_the_references_and_refuses_others_before_rewards(
    train, flags, embedded_prompts, refused, tmp_path, monkeypatch
):
    ours = train(max_train_steps=1)
    copied = Path(shutil.copytree(embedded_prompts.parent, tmp_path / "theirs")) / "videos2caption.json"
    (tmp_path / "theirs/prompt.json").rename(copied)
    for file in (tmp_path / "theirs/text_ids").iterdir():
        torch.save(torch.load(file, weights_only=True)[0].clone(), file)
    theirs = train(data_json_path=copied, max_train_steps=1)
    assert torch.equal(theirs.gradient(), ours.gradient())
    monkeypatch.setattr(train_grpo_flux, "Scoring", lambda *_: pytest.fail("rewards were loaded"))
    for file in (tmp_path / "theirs/prompt_embed").iterdir():
        torch.save(torch.load(file, weights_only=True)[:, :32].clone(), file)
    with refused(f"--data_json_path {copied}: the prompt embedding of '.*' is 32 wide, the transformer .* takes 64"):
        train_grpo_flux.main(flags(data_json_path=copied))
    assert not (tmp_path / "run").exists()


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
        (lambda path: path.write_text("[" * 100_000), "not a JSON file"),
        (lambda path: path.write_text(path.read_text().replace("caption 0", r"\ud83d")), "not a JSON file"),
        (
            lambda path: path.write_text(path.read_text().replace('"1.pt', '"' + "x" * 300)),
            "3 embedding files can.t be found",
        ),
        (lambda path: path.write_text("[3]"), "entry 0 has no text under prompt_embed_path"),
        (without_key, "entry 3 has no text under caption"),
        (
            lambda path: path.write_text(path.read_text().replace('"}', '", "weight": -1}')),
            "entry 0: the weight -1 is no",
        ),
        (lambda path: (path.parent / "text_ids" / "2.pt").unlink(), "1 embedding file can.t be found, such as .*2.pt"),
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


def test_threads_read_the_same_batches_and_a_read_that_never_ends_is_named(tmp_path, monkeypatch):
    dataset, cpu = LatentFluxRLDataset(make_data(tmp_path)), torch.device("cpu")
    none, three = (
        [batch["caption"] for batch in itertools.islice(read_ahead(dataset, PromptSampler(5, 2), threads, cpu), 9)]
        for threads in (0, 3)
    )
    assert none == three

    def stuck(_: object) -> None:
        threading.Event().wait(5)

    monkeypatch.setattr(latent_flux_rl_datasets, "collate", stuck)
    monkeypatch.setattr(latent_flux_rl_datasets, "READ_LIMIT", 0.1)
    with pytest.raises(WaitedTooLong, match=r"embeddings beside .*prompt\.json did not come within 0\.1 seconds"):
        next(read_ahead(dataset, PromptSampler(5, 2), 1, cpu))
