import shlex

import pytest

MEANT = [
    ("train --lr 1e-3 --dry-run", "cmtool train --set train.lr=1e-3 --dry-run"),
    ("train --batch=32 --dry-run", "cmtool train --set train.batch=32 --dry-run"),
    ("train --batch-size 32 --dry-run", "cmtool train --set train.batch=32 --dry-run"),
    ("train --dry-run --steps 100", "cmtool train --dry-run --set train.steps=100"),
    ("train --resolution 8 --dry-run", "cmtool train --set 'model.image_size=[8,8]' --dry-run"),
    ("distill --config digits-cd --dry-run", "cmtool distill --preset digits-cd --dry-run"),
    ("sample --num 4 --out x.png", "cmtool sample --seeds 0-3 --out x.png"),
    ("sample --num-samples 4 --out x.zip", "cmtool sample --seeds 0-3 --out x.zip"),
    ("sample --ckpt digits-cd --output x", "cmtool sample --checkpoint digits-cd --out x"),
    ("train --batch_size=32 --lr 1e-3 --dry-run",
     "cmtool train --set train.batch=32 --set train.lr=1e-3 --dry-run"),
    ("train --data_dir digits --image_size 8 --dry-run",
     "cmtool train --data digits --set 'model.image_size=[8,8]' --dry-run"),
    ("train --num_workers 0 --dry-run", "cmtool train --set data.workers=0 --dry-run"),
    ("train --resume_checkpoint r --dry-run", "cmtool train --out r --resume --dry-run"),
    ("sample --model_path digits-cd --num_samples 2 --out x.png",
     "cmtool sample --checkpoint digits-cd --seeds 0-1 --out x.png"),
    ("sample --seed 3 --num_inference_steps=1 --output_dir x",
     "cmtool sample --seeds 3 --steps 1 --out x"),
    ("eval fid digits --ref digits --num 9", "cmtool eval fid digits --reference digits --num 9"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "meant"), MEANT)
def test_options_of_other_tools_are_answered_with_ours(cmtool, typed, meant):
    result = cmtool(*shlex.split(typed))
    assert result.code == 2
    assert result.out == b""
    error, hint = result.err.splitlines()
    assert "has no option --" in error
    assert hint == f"hint: {meant}"
    again = cmtool(*shlex.split(meant)[1:])  # what is typed as the hint says is not wrong twice
    assert again.code == 0 or "--resume" in meant


def test_a_path_after_resume_is_the_folder_of_the_run(cmtool):
    result = cmtool("train", "--resume", "runs/my run", "--dry-run")
    assert result.code == 2
    assert result.err.splitlines()[1] == "hint: cmtool train --out 'runs/my run' --resume --dry-run"


@pytest.mark.parametrize(
    ("typed", "what", "hint"),
    [
        ("trian", "no such command 'trian'", "cmtool --help lists all commands"),
        ("eval fdi", "no such command 'fdi'", "cmtool eval --help lists all commands"),
        ("train --presett x", "has no option --presett", "did you mean --preset?"),
        (
            "sample --lr 3",
            "cmtool sample has no option --lr",
            "cmtool sample --help lists all options",
        ),
        ("sample --num four", "has no option --num", "cmtool sample --help"),
        ("sample --num", "has no option --num", "cmtool sample --help"),
        ("sample --num 0", "has no option --num", "cmtool sample --help"),
        ("train --lr --dry-run", "has no option --lr", "cmtool train --help"),
        ("train --batch_size", "has no option --batch_size", "cmtool train --help"),
        ("sample --lr 1 --num 4 --fp16", "has no option --lr", "cmtool sample --help"),
        ("train --size x", "has no option --size", "cmtool train --help"),
        ("train --resume --dry-run x", "unexpected extra argument", "cmtool train --help"),
        ("train --out r --resume x", "unexpected extra argument", "cmtool train --help"),
        ("sample --steps x", "invalid value for '--steps'", "cmtool sample --help"),
        ("data prepare", "missing argument 'SRC'", "cmtool data prepare --help"),
        ("eval fid --num", "requires an argument", "--help"),
    ],
)
def test_wrong_usage_is_two_lines(cmtool, typed, what, hint):
    result = cmtool(*typed.split())
    assert result.code == 2
    assert result.out == b""
    lines = result.err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["error", "hint"]
    assert what in lines[0]
    assert hint in lines[1]


@pytest.mark.parametrize("typed", ["", "eval", "edit", "preset"])
def test_a_group_alone_shows_its_help(cmtool, typed):
    result = cmtool(*typed.split())
    assert result.code == 2
    assert "Commands" in result.err + result.text
