"""Prompt files to cached embeddings: which caption gets which file, restarts, kills, several processes, bad files."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from fastvideo.data_preprocess import preprocess_flux_embedding
from fastvideo.data_preprocess.preprocess_flux_embedding import embed_prompts, main
from fastvideo.io.devices import resolve_dtype
from fastvideo.io.files import write_bytes
from fastvideo.io.fingerprint import model_fingerprint
from fastvideo.models.flux import Flux1
from fastvideo.models.pretrained import load_text_encoders

import pytest
import torch
from conftest import TIME_LIMIT

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "data/tiny_flux")
PROMPTS = [
    "a red circle left of a blue square on a black background",
    'a "quoted" one / with a slash',
    "🙂 emoji, ünïcödé",
    "x " * 1000,
    "last",
]
MODULE = "fastvideo.data_preprocess.preprocess_flux_embedding"


def prompt_file(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def flags(prompts: Path, output: Path, *more: str) -> list[str]:
    return ["--model_path", TINY, "--prompt_dir", str(prompts), "--output_dir", str(output), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_each_caption_gets_the_embedding_that_the_pipeline_makes_of_it(tmp_path):
    index = main(flags(prompt_file(tmp_path, *PROMPTS), tmp_path / "out", "--batch-size", "2"))
    entries = json.loads(index.read_text())
    assert [set(entry) for entry in entries] == [
        {"prompt_embed_path", "pooled_prompt_embeds_path", "text_ids", "caption"}
    ] * 5
    assert [entry["caption"] for entry in entries] == [prompt.strip() for prompt in PROMPTS]
    pipe = load_text_encoders(TINY)
    for entry in entries:
        embeds, pooled, ids = Flux1().encode_prompts(pipe, [entry["caption"]]).values()
        for folder, key, expected in (
            ("prompt_embed", "prompt_embed_path", embeds[0]),
            ("pooled_prompt_embeds", "pooled_prompt_embeds_path", pooled[0]),
            ("text_ids", "text_ids", ids),
        ):
            stored = torch.load(index.parent / folder / entry[key], weights_only=True)
            assert stored.shape == expected.shape and stored.untyped_storage().nbytes() == stored.numel() * 4
            torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-5)


def test_captions_stay_bound_to_their_embeddings_when_the_prompt_file_is_edited(tmp_path, capsys):
    def bound(*lines: str) -> dict[str, bytes]:
        index = main(flags(prompt_file(tmp_path, *lines), tmp_path / "out", "--batch_size", "1"))
        entries = json.loads(index.read_text())
        assert [entry["caption"] for entry in entries] == list(lines)
        return {e["caption"]: (index.parent / "prompt_embed" / e["prompt_embed_path"]).read_bytes() for e in entries}

    before = bound("one", "two", "three")
    assert "note: " not in capsys.readouterr().err
    after = bound("zero", "three", "one and a half", "one")
    assert "prompt.json listed 3 prompts, 1 of which" in capsys.readouterr().err
    assert after["one"] == before["one"] and after["three"] == before["three"]
    assert len({*before.values(), *after.values()}) == 5


def test_prompts_longer_than_the_model_takes_are_counted_and_the_longest_is_shown(tmp_path, capfd):
    long = "a red circle left of a blue square on a black background"
    prompts = prompt_file(tmp_path, "a red circle", f"{long} and {long}", f"{long} and a circle")
    main(flags(prompts, tmp_path / "out", "--batch_size", "1"))
    told = capfd.readouterr().err
    (line,) = (line for line in told.splitlines() if line.startswith("warning"))
    assert "takes 14 tokens of a prompt and doesn't see what follows in 2 prompts; the longest has " in line
    assert line.endswith(repr(f"{long} and {long}"[:80])) and "truncated" not in told and "indexing errors" not in told
    main(flags(prompt_file(tmp_path, "a red circle"), tmp_path / "short"))
    assert "warning" not in capfd.readouterr().err


def test_a_restart_keeps_intact_embeddings_and_remakes_damaged_ones(tmp_path, monkeypatch, capsys):
    prompts = prompt_file(tmp_path, "one", "two", "three")
    index = main(flags(prompts, tmp_path / "out"))
    before = contents(tmp_path / "out")
    victim = index.parent / "prompt_embed" / json.loads(index.read_text())[1]["prompt_embed_path"]
    victim.write_bytes(victim.read_bytes()[:100])
    capsys.readouterr()
    main(flags(prompts, tmp_path / "out"))
    assert "1 embedded, 2 were there" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before

    def no_load(*_):
        raise AssertionError("text encoders loaded although nothing is missing")

    monkeypatch.setattr(preprocess_flux_embedding, "load_text_encoders", no_load)
    main(flags(prompts, tmp_path / "out"))


def test_another_model_or_length_does_not_reuse_the_embeddings(tmp_path):
    encoders = tmp_path / "model"
    for folder in ("text_encoder", "tokenizer"):
        (encoders / folder).mkdir(parents=True)
        (encoders / folder / "weights.bin").write_bytes(bytes(10_000))
    parts = (*Flux1.text_encoders, *Flux1.tokenizers)
    before = model_fingerprint(str(encoders), parts)
    assert before == model_fingerprint(str(encoders), parts) != model_fingerprint(TINY, parts)
    (encoders / "text_encoder" / "weights.bin").write_bytes(bytes(5_000) + b"x" + bytes(4_999))
    assert model_fingerprint(str(encoders), parts) != before

    prompts = prompt_file(tmp_path, "one")
    long, short = (
        json.loads(embed_prompts(TINY, prompts, tmp_path / "out", max_sequence_length=n).read_text()) for n in (16, 8)
    )
    assert long[0]["prompt_embed_path"] != short[0]["prompt_embed_path"]


def test_duplicates_and_empty_lines_are_left_out_and_counted(tmp_path, capsys):
    index = main(flags(prompt_file(tmp_path, "", "one", "  ", "two", "one", " one "), tmp_path / "out"))
    assert [entry["caption"] for entry in json.loads(index.read_text())] == ["one", "two"]
    assert "2 prompts (2 empty lines and 2 duplicates left out)" in capsys.readouterr().out


def test_bad_prompt_files_give_one_line_that_names_flag_file_and_line(tmp_path, refused):
    path = tmp_path / "p.txt"
    with refused(r"--prompt_dir .*p\.txt: No such file"):
        main(flags(path, tmp_path / "out"))
    path.write_bytes(b"\n \n")
    with refused(r"--prompt_dir .*p\.txt: no prompts in it"):
        main(["--prompt_path", str(path), *flags(path, tmp_path / "out")[4:]])  # a reference's name of the flag
    path.write_bytes(b"fine\n\ncaf\xe9\nfine\n\xff\n")
    with refused(r"--prompt_dir .*not UTF-8 text: line 3 \(byte 0xe9 at position 4\), line 5 \(byte 0xff"):
        main(flags(path, tmp_path / "out"))
    with refused("--model_path /nowhere/flux: no such folder"):
        main(flags(prompt_file(tmp_path, "one"), tmp_path / "out", "--model_path", "/nowhere/flux"))
    assert not (tmp_path / "out" / "prompt.json").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_bytes(path, b"old")

    def full_disk(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert contents(tmp_path) == {"f": b"old"}


def test_a_killed_run_gives_the_same_files_after_a_restart(tmp_path):
    prompts = prompt_file(tmp_path, *(f"prompt number {i}" for i in range(60)))
    command = flags(prompts, tmp_path / "killed", "--batch_size", "1")
    process = subprocess.Popen([sys.executable, "-m", MODULE, *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIME_LIMIT
    while len(list((tmp_path / "killed").glob("prompt_embed/*.pt"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "prompt.json").exists()
    main(command)
    main(flags(prompts, tmp_path / "whole", "--batch_size", "1"))
    visible = {name: data for name, data in contents(tmp_path / "killed").items() if not name.endswith(".tmp")}
    assert visible == contents(tmp_path / "whole")


def test_two_processes_give_the_same_files_as_one(tmp_path):
    prompts = prompt_file(tmp_path, *PROMPTS)
    main(flags(prompts, tmp_path / "one", "--batch_size", "2"))
    launcher = [sys.executable, "-m", "fastvideo.torchrun", "--standalone", "--nproc_per_node", "2", "-m", MODULE]
    command = [*launcher, *flags(prompts, tmp_path / "two", "--batch_size", "2")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=TIME_LIMIT)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("device", "chosen"), [("cpu", "fp32"), ("cpu:0", "fp32"), ("cuda", "bf16"), ("cuda:1", "bf16")]
)
def test_auto_chooses_the_number_format_by_the_kind_of_device(device, chosen):
    """Accelerate calls the CPU cpu:0 where several processes share it."""
    assert resolve_dtype("auto", device) == chosen and resolve_dtype("fp16", device) == "fp16"


def test_processes_without_a_group_are_refused(tmp_path):
    with pytest.raises(ValueError, match="start them with torchrun"):
        embed_prompts(TINY, prompt_file(tmp_path, "one"), tmp_path / "out", rank=0, world_size=2)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_pipeline_without_a_tokenizer_s_vocabulary_is_refused(part, tmp_path):
    """transformers would make an empty tokenizer, which encodes all prompts alike."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    for path in (model / part).iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    with pytest.raises(ValueError, match=f"pretrained_model_name_or_path {model}: no vocabulary in its {part}"):
        load_text_encoders(str(model))
