"""Formats of prompt files: what can be read is read, anything else is refused with one line that names the place."""

import gzip
import io
import json
import pickle
import re
import shutil
from pathlib import Path

from fastvideo import train_grpo_flux
from fastvideo.cli import FlagError
from fastvideo.data_preprocess import preprocess_flux_embedding
from fastvideo.io.prompts import read_prompts
from fastvideo.sample import sample_flux

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def parquet(**columns) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


TWO = ["a red circle, big", "два синих квадрата"]
LINES = "\n".join(TWO) + "\n"
OBJECTS = [{"tag": 1, "prompt": TWO[0]}, {"tag": 2, "prompt": TWO[1]}]
JSON_LINES = "".join(json.dumps(entry) + "\n" for entry in OBJECTS)
READ = {
    "lines.txt": LINES,
    "windows.txt": LINES.replace("\n", "\r\n"),
    "old_mac.txt": LINES.replace("\n", "\r"),
    "no_suffix": LINES.rstrip(),
    "mark.txt": LINES.encode("utf-8-sig"),
    "utf16.txt": LINES.encode("utf-16"),
    "utf16_be_mark.txt": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "utf32.txt": LINES.encode("utf-32"),
    "list.json": json.dumps(TWO),
    "list.txt": json.dumps(TWO, ensure_ascii=False),
    "captions.json": json.dumps([{"caption": TWO[0]}, {"text": TWO[1]}], indent=1),
    "captions.txt": json.dumps([{"caption": TWO[0]}, TWO[1]], indent=1),
    "lines.jsonl": JSON_LINES,
    "lines.json": "\n" + JSON_LINES,
    "json_lines.txt": JSON_LINES.replace("\n", "\r\n"),
    "texts.jsonl": "".join(json.dumps(text) + "\n" for text in TWO),
    "table.csv": f'id,caption\n1,"{TWO[0]}"\n2,{TWO[1]}\n',
    "excel.csv": f"Prompt;seed\n{TWO[0]};1\n{TWO[1]};2\n".encode("utf-8-sig"),
    "tabs.tsv": f"seed\ttext\n1\t{TWO[0]}\n2\t{TWO[1]}\n",
    "both.csv": f'text,prompt\nx,"{TWO[0]}"\nx,{TWO[1]}\n',
    "columns.parquet": parquet(text=["x", "y"], Prompt=TWO, picture=[b"\x89PNG", None]),
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", READ)
def test_every_format_gives_the_same_prompts(name, tmp_path):
    assert read_prompts(write(tmp_path, name, READ[name]), "prompts_file").prompts == TWO


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_read_without_a_mark(encoding, tmp_path):
    text = "a red circle\nün café\n"
    assert read_prompts(write(tmp_path, "p.txt", text.encode(encoding)), "x").prompts == text.splitlines()


def test_plain_prompts_may_have_braces_brackets_commas_and_other_line_separators(tmp_path):
    prompts = [
        '{red|blue} circle, "big", id: 3',
        "[close-up] a face",
        "{}",
        "prompt, caption",
        "two\u2028still two",
        "[1, 2]",
    ]
    for start in range(len(prompts)):
        given = prompts[start:] + prompts[:start]
        assert read_prompts(write(tmp_path, "p.txt", "\n".join(given)), "prompts_file").prompts == given
    assert read_prompts(write(tmp_path, "p.txt", "[1, 2]"), "prompts_file").prompts == ["[1, 2]"]


def test_a_line_break_inside_a_prompt_is_a_space_and_empty_entries_are_counted(tmp_path):
    found = read_prompts(write(tmp_path, "p.jsonl", '"a\\n b"\n""\n"c"\n"c"\n'), "prompts_file")
    assert (found.prompts, found.empty, found.duplicates) == (["a b", "c"], 1, 1)


REFUSED = {
    "cut.jsonl": (JSON_LINES[:-5], "line 2: not JSON"),
    "cut.txt": (JSON_LINES[:-5], "line 2: not JSON"),
    "cut.json": (json.dumps(OBJECTS, indent=1)[:-20], "line [0-9]+: not JSON"),
    "cut_list.txt": (json.dumps(OBJECTS, indent=1)[:-20], "line [0-9]+: not JSON"),
    "other_key.jsonl": (
        '{"prompt": "a"}\n{"sentence": "b"}\n',
        "line 2: neither a text nor an object",
    ),
    "other_key.txt": ('{"sentence": "a"}\n{"sentence": "b"}\n', "line 1: neither"),
    "numbers.json": ("[1, 2]", "entry 0: neither"),
    "null.json": ('["a", {"prompt": null}]', "entry 1: neither"),
    "object.json": ('{"images": []}', "line 1: neither"),
    "nested.json": ("[" * 100_000, "too many levels"),
    "plain.json": ("a red circle\n", "line 1: not JSON"),
    "empty.json": ("[]", "no prompts in it"),
    "comment.txt": ("# prompts\n" + JSON_LINES, "line 2: a JSON object"),
    "no_header.csv": ("1,a red\n2,a blue\n", "line 1: no column prompt, caption, text; the columns are '1', 'a red'"),
    "other_column.parquet": (
        parquet(sentence=TWO, id=[1, 2]),
        "no column prompt, .*; the columns are 'sentence', 'id'",
    ),
    "numbers.parquet": (parquet(prompt=[1, 2]), "row 0: prompt is no text but 1"),
    "cut.parquet": (parquet(prompt=TWO)[:-9], "not a readable Parquet file"),
    "text.parquet": (LINES, "not a readable Parquet file"),
    "nan.json": ('[{"prompt": "a", "size": NaN}]', "not JSON compliant"),
    "negative.jsonl": ('{"prompt": "a"}\n{"prompt": "b", "weight": -1}\n', "line 2: the weight -1 is no number from 0"),
    "nan.csv": ("prompt,weight\na,1\nb,nan\n", "line 3: the weight 'nan' is no number"),
    "text.csv": ("prompt,weight\na,often\n", "line 2: the weight 'often' is no number"),
    "huge.parquet": (parquet(prompt=["a"], weight=[1e9]), "row 0: the weight 1000000000.0 is no number from 0 to 1000"),
    "truth.json": ('[{"prompt": "a", "weight": true}]', "entry 0: the weight True is no number"),
    "unquoted.csv": ("id,prompt\n1,a\n2,a red, big circle\n", "line 3: 3 fields; the header has 2"),
    "short.csv": ("id,prompt\n1\n", "line 2: 1 fields; the header has 2"),
    "open_quote.csv": ('prompt\n"a\n', "line 2: unexpected end of data"),
    "table.txt": ("id,caption\n1,a red circle\n", "line 1: the header of a table; name the file .csv"),
    "tabs.txt": ("prompt\tseed\na red circle\t3\n", "line 1: the header of a table"),
    "column.txt": ("prompt\na red circle\n", "line 1: the header of a table"),
    "escape.txt": ("one\ntwo \x1b[31m\n", "line 2 has the control character 27"),
    "nul.json": (json.dumps(["a \0 circle"]), "a character that no text has"),
    "half_a_pair.jsonl": (r'{"prompt": "a \ud83d circle"}', "a character that no text has"),
    "prompts.yaml": ("prompts:\n- a red circle\n", "not one of the formats"),
    "prompts.pkl": (pickle.dumps(TWO[:1], protocol=0), "not one of the formats"),
    "page.txt": ("<!DOCTYPE html>\n<p>a red circle</p>\n", "not one of the formats"),
    "print.txt": ("%PDF-1.4\n1 0 obj\nendobj\n", "not one of the formats"),
    "nul.txt": ("one\ntwo\0\n", "line 2 has the control character 0"),
    "zeros.txt": (bytes(100), "line 1 has the control character"),
    "latin1.txt": ("one\rcaf\xe9".encode("latin-1"), r"not UTF-8 text: line 2 \(byte 0xe9 at position 4\)"),
    "odd.txt": ("\ufeffone".encode("utf-16-le")[:-1], "not UTF-16-LE text"),
    "prompts.txt.gz": (gzip.compress(LINES.encode() * 20), "not UTF-8 text: line 1"),
}


# The problem is the format, not what is in it.
OTHER_FORMAT = "neither|: not JSON|no column|not a readable Parquet|is no text but|not one of the formats"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_list_of_prompts_is_refused_with_its_place_and_another_format_with_those_that_are_read(
    name, tmp_path
):
    content, problem = REFUSED[name]
    with pytest.raises(FlagError, match=f"^prompts_file .*{name}: .*{problem}") as error:
        read_prompts(write(tmp_path, name, content), "prompts_file")
    line = str(error.value)
    assert "\n" not in line
    assert ("; give text with one prompt per line, a JSON" in line) == bool(re.search(OTHER_FORMAT, line))


def test_a_prompt_file_that_is_not_there_is_one_short_line(tmp_path):
    with pytest.raises(FlagError) as error:
        read_prompts(tmp_path / "p.txt", "prompts_file")
    assert str(error.value) == f"prompts_file {tmp_path / 'p.txt'}: No such file or directory"


def test_what_parquet_files_and_data_sets_say_beside_a_prompt_is_what_json_lines_say(tmp_path, monkeypatch):
    wants = [{"include": [{"class": "dog", "count": 2}], "n": 1}, {"include": [{"class": "cat"}], "share": 0.5}, {}]
    lines = [{"prompt": p, **rest} for p, rest in zip(["[1, 2]", "b", "c"], wants, strict=True)]
    folder = tmp_path / "set"
    folder.mkdir()
    json_lines = write(folder, "train.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"n": None, "share": None, **line, "picture": b"x"} for line in lines]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    for path in (json_lines, tmp_path / "p.parquet", folder, f"{folder}:train", f"{folder}:default:train[:3]"):
        found = read_prompts(path, "prompts_file")
        assert found.prompts == ["[1, 2]", "b", "c"] and found.metadata == wants
    assert read_prompts(f"{folder}:train[1:]", "prompts_file").prompts == ["b", "c"]
    with pytest.raises(FlagError, match=r"no such part of the data set. Cause: Unknown split \"test\".*\['train'\]"):
        read_prompts(f"{folder}:test", "prompts_file")
    with pytest.raises(FlagError, match="no column sentence; the columns are 'prompt', 'include', 'n', 'share'"):
        read_prompts(folder, "prompts_file", "sentence")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FlagError, match="no data set that `datasets` can load from this folder"):
        read_prompts(tmp_path / "empty", "prompts_file")


def test_a_data_set_that_the_hub_does_not_give_is_one_line_that_says_what_to_do(flags, refused, monkeypatch):
    with refused("--prompts_file lab/prompts:test: no such file, and .* isn't downloaded yet: HF_HUB_OFFLINE is set"):
        train_grpo_flux.main(flags(prompts_file="lab/prompts:test"))

    def gated(name: str, *_, **__) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' is a gated dataset on the Hub.\nAsk.")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    with refused("--prompts_file lab/prompts: no such file, .*accept the terms .* HF_TOKEN.* Cause: .*gated dataset"):
        train_grpo_flux.main(flags(prompts_file="lab/prompts"))


def test_weights_and_the_column_of_the_prompts(tmp_path):
    table = "sentence,Prompt,weight\na,x,2\nb,y,\nb,z,7\nc,w,0.5\n"
    for path in (write(tmp_path, "p.csv", table), write(tmp_path, "p.tsv", table.replace(",", "\t"))):
        found = read_prompts(path, "prompts_file", "Sentence")
        assert (found.prompts, found.weights) == (["a", "b", "c"], [2, 1, 0.5])
        assert found.metadata == [{"prompt": "x"}, {"prompt": "y"}, {"prompt": "w"}]
    objects = write(tmp_path, "p.json", json.dumps([{"sentence": "a", "prompt": "x", "weight": 0}, "b"]))
    found = read_prompts(objects, "prompts_file", "sentence")
    assert (found.prompts, found.weights, found.metadata) == (["a", "b"], [0, 1], [{"prompt": "x"}, {}])
    with pytest.raises(FlagError, match="entry 0: .* under words; its keys are 'sentence', 'prompt', 'weight'"):
        read_prompts(objects, "prompts_file", "words")


def test_all_programs_read_prompts_alike(tiny_flux, tmp_path, flags, refused):
    table = write(tmp_path, "p.csv", "id,caption\n1,a red circle\n2,a blue square\n")
    embed = ["--model_path", tiny_flux, "--output_dir", str(tmp_path / "embedded"), "--prompt_dir"]
    index = preprocess_flux_embedding.main([*embed, str(table)])
    assert [entry["caption"] for entry in json.loads(index.read_text())] == ["a red circle", "a blue square"]
    shutil.rmtree(index.parent)
    bad = str(write(tmp_path, "bad.csv", "1,a red circle\n"))
    with refused("--prompt_dir .*bad.csv: line 1"):
        preprocess_flux_embedding.main([*embed, bad])
    with refused("--prompts_file .*bad.csv: line 1"):
        sample_flux.main(["--pretrained_model_name_or_path", tiny_flux, "--baseline", "--prompts_file", bad])
    with refused("--prompts_file .*bad.csv: line 1"):
        train_grpo_flux.main(flags(prompts_file=bad))
    other = ["--prompt_column", "words"]
    with refused("--prompt_dir .*p.csv: line 1: no column words; the columns are 'id', 'caption'"):
        preprocess_flux_embedding.main([*embed, str(table), *other])
    with refused("--prompts_file .*p.csv: line 1: no column words"):
        sample_flux.main(
            ["--pretrained_model_name_or_path", tiny_flux, "--baseline", "--prompts_file", str(table), *other]
        )
    with refused("--prompts_file .*p.csv: line 1: no column words"):
        train_grpo_flux.main([*flags(prompts_file=table), *other])
    with refused("--prompt_column words: goes with --prompts_file or --eval_prompts"):
        train_grpo_flux.main([*flags(), *other])
    assert not index.parent.exists() and not (tmp_path / "run").exists()
