import numpy as np
import pytest

from common_jax import resume
from common_jax.cli.options import MeshOptions
from common_jax.errors import InputError
from tests.tuco.studies.demo_groups import made_groups, save_models, shares
from tuco_jax.commands import demo
from tuco_jax.datasets.prompt_groups import PromptGroup, prompt_groups
from tuco_jax.datasets.refusal_strings import is_refusal
from tuco_jax.generation.generate import generate
from tuco_jax.prompts.encode import encode
from tuco_jax.scoring.score import score
from tuco_jax.studies.base import StudiedPairOptions, load_studied_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def test_demo_runs_from_end_to_end(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "prompt_groups", lambda count, seed: made_groups())
    base, tuned = models
    path = demo.run(demo.Config(base=base, tuned=tuned, out=tmp_path / "new" / "out", maps=1))
    printed = capsys.readouterr().out
    assert printed.rstrip().replace("\n", "").endswith(str(path).replace("\n", ""))
    assert "chat > plain text" in printed
    page = path.read_text()
    assert "telescoping error" in page
    assert "&lt;script&gt;" in page and "<script" not in page
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    """Such as a study's, whose report would be lost."""
    (tmp_path / "report.html").write_text("a study's")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="holds files that are no demo's; name another folder"):
        demo.run(demo.Config(base="nowhere", tuned="nowhere", out=tmp_path))
    assert (tmp_path / "report.html").read_text() == "a study's"


def test_a_folder_that_another_demo_writes_to_is_refused(tmp_path):
    with resume.alone(tmp_path), pytest.raises(InputError, match="another run is writing there"):
        demo.run(demo.Config(base="nowhere", tuned="nowhere", out=tmp_path))


@pytest.mark.slow
def test_over_a_mesh_the_table_is_the_same(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "prompt_groups", lambda count, seed: made_groups())
    tables = []
    for out, mesh in (("one", MeshOptions()), ("four", MeshOptions(data=2, fsdp=2))):
        config = demo.Config(
            base=models[0], tuned=models[1], out=tmp_path / out, maps=1, mesh=mesh
        )
        demo.run(config)
        printed = capsys.readouterr().out
        tables.append(printed[: printed.index("s in all")].rpartition("\n")[0])
    assert "chat > plain text" in tables[0] and tables[0] == tables[1]


@pytest.mark.slow
def test_the_demo_s_own_pair_and_prompts():
    """SmolLM2-135M-Instruct and the shipped adapter, as `make demo` has them."""
    groups = prompt_groups(demo.Config().prompts)
    assert [g.name for g in groups[:4]] == ["chat", "plain text", "harmful", "jailbreak"]
    for group in groups:
        assert len(set(group.texts)) == len(group.texts) >= 30
    pair, tokenizer, _ = load_studied_pair(StudiedPairOptions())

    prompts = [p for group in groups for p in group.prompts()[:2]]
    tokens = encode(tokenizer, prompts)
    scores = score(pair, tokenizer, prompts)
    assert float(scores.telescoping.max()) < 1e-5
    for i in (0, 2, 4):  # chat, plain text, harmful: the short ones
        np.testing.assert_allclose(scores.tuco[i], shares(pair, tokens[i][-64:])[-1], atol=1e-5)

    # What the adapter was taught: of these, 92 and 12 of 100 are refused (docs/finetune.md).
    asked = [p for name in ("harmful", "chat") for p in by(groups, name).prompts()[:8]]
    refused = [is_refusal(a) for a in generate(pair, tokenizer, asked, max_new_tokens=30)]
    assert sum(refused[:8]) >= 6 and sum(refused[8:]) <= 2


def by(groups: list[PromptGroup], name: str) -> PromptGroup:
    return next(g for g in groups if g.name == name)
