"""A model goes onto the hub with all that is known of it, and comes back as the same model."""

from types import SimpleNamespace

import pytest
import torch

from cmtool import publish
from cmtool.errors import InputError, MissingError, ResourceError, UserError
from cmtool.models import load_model
from cmtool.publish import push
from tests.cli.conftest import TINY, cmtool  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>'")  # of the hub's own library


@pytest.fixture(autouse=True)
def token(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


def files_of(hub, name):
    return hub.commits[name, hub.branches[name, "main"]]


def test_a_run_is_pushed_with_its_card_and_is_the_same_model_again(hub, cmtool, tmp_path):  # noqa: F811
    words = ["distill", "--preset", "digits-cd", "--set", "train.steps=2", "--set", "train.batch=4",
             "--set", "run.eval_every=2", "--set", "run.eval_num=20", "--device", "cpu",
             "--set", "run.log_every=2"]  # fmt: skip
    assert cmtool(*words, "--out", "run").code == 0
    said = cmtool("checkpoint", "push", "run", "hf:me/digits", "--license", "mit", "--private")
    assert said.code == 0, said.err
    commit = hub.branches["me/digits", "main"]
    assert said.text == f"hf:me/digits@{commit}\n"
    files = files_of(hub, "me/digits")
    assert files.keys() == {
        ".gitattributes", "README.md", "model.safetensors", "preset.toml", "samples.png"
    }  # fmt: skip
    assert hub.private["me/digits"] is True
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: mit\nlibrary_name: cmtool\n")
    ours = load_model(str(tmp_path / "run"))
    for words in ("consistency_distillation", "2 steps of 4 images", "digits-edm, sha256",
                  "11,536 images", "| fd-digits |", "cmtool sample -c hf:me/digits",
                  "![samples](samples.png)"):  # fmt: skip
        assert words in card, card
    theirs = load_model("hf:me/digits")
    assert theirs.source == f"hf:me/digits@{commit}/model.safetensors"
    state = ours.f.network.state_dict()
    for name, tensor in theirs.f.network.state_dict().items():
        assert torch.equal(tensor, state[name])
    again = cmtool("checkpoint", "push", "run", "hf:me/digits", "--license", "mit")
    assert again.code == 2
    assert "has README.md, model.safetensors, preset.toml, samples.png already" in again.err
    assert hub.branches["me/digits", "main"] == commit
    more = ["--license", "cc-by-4.0", "--overwrite", "--json"]
    again = cmtool("checkpoint", "push", "run", "hf:me/digits", *more)
    assert again.code == 0, again.err
    assert b"license: cc-by-4.0" in files_of(hub, "me/digits")["README.md"]


def test_a_bundled_model_has_a_card_too(hub):
    name = push(load_model("digits-edm"), "hf:me/teacher", "apache-2.0")
    files = files_of(hub, "me/teacher")
    assert name.startswith("hf:me/teacher@")
    assert "samples.png" not in files
    assert b"cmtool distill --teacher hf:me/teacher" in files["README.md"]
    assert b"## Numbers" not in files["README.md"]


@pytest.mark.parametrize(
    ("name", "licence", "what"),
    [
        ("hf:me/x@main", "mit", "pushed to a repository, not to"),
        ("hf:me/x/model.safetensors", "mit", "pushed to a repository, not to"),
        ("me/x", "mit", "names no model of a hub"),
        ("hf:me/x", "mit\nlibrary_name: evil", "is no name of a licence"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(hub, name, licence, what):
    with pytest.raises(UserError, match=what):
        push(load_model("digits-cd"), name, licence)
    assert not hub.asked
    assert not hub.commits


def test_a_licence_is_asked_for(cmtool):  # noqa: F811
    said = cmtool("checkpoint", "push", "digits-cd", "hf:me/x")
    assert said.code == 2
    assert "for example --license apache-2.0" in said.err


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses_says_what_is_wanted(hub, status):
    hub.refuses = status
    with pytest.raises(InputError) as error:
        push(load_model("digits-cd"), "hf:me/x", "mit")
    assert "HF_TOKEN" in error.value.hint


def test_an_upload_that_breaks_off_is_told_and_goes_on_when_repeated(hub):
    hub.broken = True
    with pytest.raises(ResourceError, match="did not reach hf:me/x"):
        push(load_model("digits-cd"), "hf:me/x", "mit")
    assert files_of(hub, "me/x").keys() == {".gitattributes"}
    hub.broken = False
    push(load_model("digits-cd"), "hf:me/x", "mit")
    assert "model.safetensors" in files_of(hub, "me/x")


def test_without_a_network_it_says_so(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingError, match="needs the network"):
        push(load_model("digits-cd"), "hf:me/x", "mit")


def test_the_run_of_a_checkpoint_is_found_from_any_of_its_files(tmp_path, monkeypatch):
    (tmp_path / "run" / "run.json").parent.mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    folder = tmp_path / "run" / "checkpoints" / "step-0000001"
    folder.mkdir(parents=True)
    (folder / "ema.safetensors").write_bytes(b"")
    monkeypatch.setattr(publish, "read_history", lambda path: path)
    monkeypatch.chdir(folder)
    for place in (tmp_path / "run", folder, folder / "ema.safetensors", "ema.safetensors", "."):
        assert publish._run_of(SimpleNamespace(source=str(place))) == tmp_path / "run"
    assert publish._run_of(SimpleNamespace(source=str(tmp_path))) is None
