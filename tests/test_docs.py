"""README and docs: links lead somewhere, flags, files and commands exist, and what can be copied runs."""

import re
import shlex
from functools import cache
from pathlib import Path

from fastvideo.cli import parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.data_preprocess.preprocess_flux_embedding import Embeddings, PreprocessConfig
from fastvideo.eval.report import ReportConfig
from fastvideo.eval.settings import EvalConfig
from fastvideo.models.merge_lora import MergeConfig
from fastvideo.models.pretrained import family_of
from fastvideo.models.reward_model.custom import probe
from fastvideo.models.reward_model.server import ServerConfig
from fastvideo.runtime.memory import checkpoint_size
from fastvideo.sample.settings import SampleConfig

import pytest
import torch
from conftest import PROMPTS, ROOT
from diffusers import FluxTransformer2DModel

PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "*_ckpt/README.md") for path in ROOT.glob(pattern))
# Flags of programs that aren't ours.
FOREIGN = set(
    "nproc_per_node port config_file random-source nodes shutdown-timeout no-deps append signal build-arg gpus rm "
    "shm-size logdir exclude".split()
)
PROGRAMS = {
    "scripts/inference/inference_flux.sh": SampleConfig,
    "scripts/evaluate/eval_reward.sh": EvalConfig,
    "scripts/preprocess/preprocess_flux_rl_embeddings.sh": PreprocessConfig,
    "fastvideo/models/reward_model/server.py": ServerConfig,
    "fastvideo.sample.sample_flux": SampleConfig,
    "fastvideo.eval.report": ReportConfig,
    "fastvideo.models.merge_lora": MergeConfig,
}


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_flags_and_files_that_the_pages_name_exist():
    folders = ("fastvideo", "scripts", "benchmarks")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".sh")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in [*sources, ROOT / "tests/conftest.py"])
    known = {*re.findall(r"--([a-z][\w-]+)", code), *re.findall(r"^    (\w+): .* = flag\(", code, re.MULTILINE)}
    known |= set(re.findall(r"alias=\"(\w+)\"", code))
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--([a-z]\w+(?:-\w+)*)", text_of(page)))
        assert not {name for name in named - FOREIGN if not {name, name.removeprefix("no_")} & known}, page
        files = re.findall(r"(?<![\w/.])((?:fastvideo|scripts|benchmarks|tests|docs)/[\w/.]+\.\w+)", text_of(page))
        examples = re.compile("redness|Random")  # of CONTRIBUTING.md
        assert not [name for name in files if not (ROOT / name).exists() and not examples.search(name)], page


def commands(page: Path) -> list[list[str]]:
    """The words of each command in the page's blocks of shell code."""
    found, variables = [], {}
    for block in re.findall(r"^( *)```bash\n(.*?)\1```", text_of(page), re.MULTILINE | re.DOTALL):
        for line in map(str.strip, block[1].splitlines()):
            if given := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[given[1]] = given[2]
            else:
                expanded = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
                found.append(shlex.split(expanded, comments=True))
    return [words for words in found if words]


def recipe_flags(recipe: Path) -> list[str]:
    """The flags that a recipe and launch.sh give."""
    text = recipe.with_name("launch.sh").read_text() + recipe.read_text()
    text = re.sub(r"^cached (\S+)", r"flag data_json_path \1", text, flags=re.MULTILINE)
    found = re.findall(r"^flag (\w+) (\S+)", text, re.MULTILINE)
    return [word for name, value in found for word in (f"--{name}", value)]


def test_commands_of_the_pages_have_flags_and_values_that_their_programs_take():
    checked = 0
    for page in PAGES:
        for words in commands(page):
            for place, word in enumerate(words):
                given = words[place + 1 :]
                if re.fullmatch(r"scripts/finetune/\w*flux_\w+\.(sh|sbatch)", word):
                    own = [] if "--prompts_file" in given else recipe_flags(ROOT / word)
                    parse_dataclass(GRPOConfig, ["--override", *own, "--override", *given])
                elif word in PROGRAMS:
                    parse_dataclass(PROGRAMS[word], given)
                else:
                    continue
                checked += 1
                break
    assert checked > 20


def test_the_template_of_a_custom_reward_trains_as_it_is(train, tmp_path, monkeypatch):
    """All three functions in one run. One prompt names no colour, so its pictures have no score by has_colour."""
    blocks = re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs/custom_rewards.md"), re.DOTALL)
    for block in blocks:
        compile(block, "block", "exec")
    (tmp_path / "copied_rewards.py").write_text(blocks[0], encoding="utf-8")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text(f'prompt,rgb\n"{PROMPTS[0]}","[255, 0, 0]"\n"{PROMPTS[1]}",\n', encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    probe("copied_rewards:has_colour", "reward_model", (32, 32), 600.0)
    names = "colourful", "has_colour", "unlike_the_others"
    given = ",".join(f"copied_rewards:{name}" for name in names)
    (line,) = train(reward_model=given, prompts_file=prompts, prompts_per_iteration=2, max_train_steps=1).metrics
    assert all(0 < line[f"reward_{name}"] < 1 for name in names) and line["grad_norm"] > 0
    assert [line[f"failed_{name}"] for name in names] == [0, 4, 0]


def test_sizes_in_the_docs_are_those_of_flux_1(tmp_path):
    with torch.device("meta"):
        FluxTransformer2DModel(num_layers=19, num_single_layers=38, guidance_embeds=True).save_config(
            tmp_path / "transformer"
        )
    text = text_of(ROOT / "docs/reproduce.md")
    sizes = [int(size.replace(",", "")) for size in re.findall(r" \| ([\d,]{8,}) \| ", text)]
    common = ["--pretrained_model_name_or_path", str(tmp_path), "--prompts_file", "unused"]
    lora = "--use_lora --lora_rank 128 --lora_alpha 256".split()
    found = [
        checkpoint_size(parse_dataclass(GRPOConfig, common + more)) for more in ([], ["--ema_decay", "0.995"], lora)
    ]
    store = Embeddings(tmp_path, family_of(str(ROOT / "data/tiny_flux")), ("model", 512, "bf16"))
    store.keep("caption", tuple(torch.zeros(shape, dtype=torch.bfloat16) for shape in ((512, 4096), (768,), (512, 3))))
    assert sizes == [*found, sum(path.stat().st_size for path in store.paths("caption"))]


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 120
