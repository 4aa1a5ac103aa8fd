import tomllib

from cmtool.presets.toml import preset_names


def test_list_names_every_preset_with_its_description(cmtool):
    lines = cmtool("preset", "list").text.splitlines()
    assert [line.split()[0] for line in lines] == preset_names()
    assert all(len(line.split()) > 3 for line in lines)


def test_show_gives_toml_with_origins_that_can_be_used_again(cmtool, tmp_path):
    first = cmtool("preset", "show", "digits-cd", "--set", "train.lr=0.5")
    assert tomllib.loads(first.text)["train"]["lr"] == 0.5
    assert "lr = 0.5 # --set" in first.text
    assert "# digits-edm.toml" in first.text
    assert "# default" in first.text
    (tmp_path / "mine.toml").write_text(first.text)
    again = cmtool("preset", "show", "mine.toml")
    assert tomllib.loads(again.text) == tomllib.loads(first.text)
