"""cmtool eval: numbers for images or for a model, with what they depend on."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool import __version__
from cmtool.cli._measurement import (
    Source,
    Threshold,
    check_threshold,
    given_images,
    images_source,
    make_setting,
    measure_all,
    model_source,
    refuse_options,
    ticker,
    usual_protocol,
)
from cmtool.cli._options import (
    AsJson,
    Batch,
    Checkpoint,
    Device,
    FirstSeed,
    KindOption,
    ModelPreset,
    Precision,
    Sampler,
    Sigmas,
    Steps,
    Weights,
    pick_device,
    pick_model,
    pick_plan,
    pick_precision,
)
from cmtool.cli._output import check_free, emit, emit_json, make_folder, processes, say
from cmtool.cli.consistency import consistency
from cmtool.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable


TIMEOUT = 1800.0
DRAWN = 2048
"""Images drawn of a model when nobody says how many."""

app = typer.Typer(no_args_is_help=True, help="Measure images, or what a model makes.")

Images = Annotated[
    list[str] | None,
    typer.Argument(help="A folder, zip, npz, image files, a data set's name, or - for paths."),
]
Reference = Annotated[
    str | None,
    typer.Option(help="What to compare with: data, or statistics (npz, pkl). Default: digits."),
]
ProtocolOption = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        help="edm, adm, clean, legacy-tf, digits, vgg16 (pr only)."
        " Default: digits against the bundled digits, else edm.",
    ),
]
FeatureWeights = Annotated[
    Path | None, typer.Option(help="The weight file of the feature network, if it is elsewhere.")
]
Trust = Annotated[bool, typer.Option("--trust", help="Use a weight file of unknown sha256.")]
FeaturePrecision = Annotated[
    str, typer.Option(help="fp32, or bf16: about twice as fast, and another number.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]
Runs = Annotated[
    int,
    typer.Option(
        min=1, help="Measure so many times, with new seeds: the least FID or KID, else the mean."
    ),
]
ReferenceNum = Annotated[
    int | None,
    typer.Option(min=2, help="Images of the reference to use, the same random ones always: all."),
]
NUM_HELP = f"Images to use: all that are given; {DRAWN} of a model."

HELP = {
    "fid": """Print the Frechet distance between images and a reference, as one JSON object.

    `cmtool eval fid -c digits-cd`

    `cmtool eval fid samples.zip --reference cifar10.npz`

    `cmtool eval fid -c runs/mine --num 50000 --runs 3 --reference cifar-10-python.tar.gz`

    `cmtool sample --seeds 0-2047 | cmtool eval fid -`

    Against the bundled digits the features are those of the bundled classifier: the number is
    fd-digits, not the FID of papers. A FID falls with the number of images: compare equal numbers
    only.""",
    "kid": """Print the kernel distance (KID), which does not depend on the number of images.

    `cmtool eval kid samples/ --reference cifar10.zip`

    It is the mean over 100 seeded subsets of 1,000 images, with its standard error.""",
    "is": """Print the inception score, in splits of 5,000; no reference is needed.

    `cmtool eval is samples.npz`

    `cmtool eval is -c digits-cd --protocol digits`""",
    "pr": """Print precision and recall (k = 3) of images against a reference.

    `cmtool eval pr samples.npz --reference VIRTUAL_imagenet64_labeled.npz --protocol adm`

    With the Inception features of the paper's evaluator, or (--protocol vgg16) those of ECT's and
    StyleGAN's; the two do not compare.""",
    "all": """Print FID, KID, inception score, precision and recall, from features taken once.

    `cmtool eval all samples.zip --reference cifar10.zip`

    `torchrun --nproc-per-node 8 -m cmtool eval all -c cd.pt --num-images 50000`""",
}


def _measure_command(metric: str) -> Callable[..., None]:
    """Return the command that measures by one metric; the commands differ in nothing else."""

    def command(
        images: Images = None,
        checkpoint: Checkpoint = None,
        reference: Reference = None,
        protocol: ProtocolOption = None,
        num: Annotated[
            int | None, typer.Option("--num-images", "--num", min=2, help=NUM_HELP)
        ] = None,
        reference_num: ReferenceNum = None,
        first_seed: FirstSeed = 0,
        runs: Runs = 1,
        steps: Steps = None,
        sigmas: Sigmas = None,
        sampler: Sampler = None,
        batch: Batch = 256,
        weights: Weights = "ema",
        preset: ModelPreset = None,
        kind: KindOption = None,
        feature_weights: FeatureWeights = None,
        trust: Trust = False,
        feature_precision: FeaturePrecision = "fp32",
        workers: Workers = 2,
        device: Device = "auto",
        precision: Precision = "fp32",
        as_json: AsJson = False,
        fail_above: Annotated[
            float | None, typer.Option(help="Exit 8 if the value is larger.")
        ] = None,
        fail_below: Annotated[
            float | None, typer.Option(help="Exit 8 if the value is smaller.")
        ] = None,
    ) -> None:
        if metric in ("all", "pr") and (fail_above is not None or fail_below is not None):
            raise UserError(f"a threshold for {metric}, which is several numbers", "use fid or kid")
        if metric == "is" and (reference is not None or reference_num is not None):
            raise UserError("an inception score has no reference", "leave --reference out")
        if any(math.isnan(bound) for bound in (fail_above, fail_below) if bound is not None):
            raise UserError("a threshold of nan, which nothing is above or below", "give a number")
        of_model = {
            f"--runs {runs}": runs > 1, "--steps": steps is not None,
            "--sigmas": sigmas is not None, "--sampler": sampler is not None,
            "--preset": preset is not None, "--kind": kind is not None,
            f"--weights {weights}": weights != "ema", f"--first-seed {first_seed}": first_seed > 0,
            f"--precision {precision}": precision != "fp32",
        }  # fmt: skip

        from cmtool.system import dist

        where = pick_device(device)
        rank, world_size = processes()
        group = dist.join(rank, world_size, where, TIMEOUT)
        try:
            given = group.agreed(lambda: given_images(images, checkpoint), "names of images")
            if given is not None:
                refuse_options(of_model, "of images that are there", "it is for --checkpoint")
            chosen_protocol = protocol or usual_protocol(metric, reference)
            if chosen_protocol == "vgg16" and metric != "pr":
                raise UserError(
                    f"{metric} of --protocol vgg16", "it is for pr; take --protocol edm"
                )
            setting = make_setting(
                chosen_protocol, feature_weights, trust, feature_precision, where, batch, workers,
                group,
            )  # fmt: skip
            source: Source
            if given is not None:
                source = images_source(metric, given, setting, num)
            else:
                model = pick_model(checkpoint, weights, where, said=kind, preset=preset)
                chosen = pick_plan(model, sampler, None, steps, sigmas)
                chosen = chosen._replace(precision=pick_precision(precision, where))
                source = model_source(
                    metric, model, chosen, setting, num or DRAWN, first_seed, where
                )
            content = measure_all(
                metric, "digits" if reference is None else reference, source, setting, runs,
                reference_num,
            )  # fmt: skip
        except RuntimeError as error:
            raise dist.lost_contact(error, group, 0) or error from None
        finally:
            dist.leave()
        emit_json(content, compact=as_json)
        check_threshold(content, Threshold(fail_above, fail_below))

    return command


for _name, _help in HELP.items():
    app.command(_name, help=_help)(_measure_command(_name))


@app.command("reference")
def reference_command(
    data: Annotated[str, typer.Argument(help="A folder, zip, npz, tarball, or a data set's name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The npz to write.")],
    protocol: ProtocolOption = None,
    num: Annotated[
        int | None, typer.Option("--num-images", "--num", min=2, help="Images to use: all.")
    ] = None,
    keep_features: Annotated[
        bool, typer.Option("--keep-features", help="Keep single features too, for kid and pr.")
    ] = False,
    batch: Batch = 256,
    feature_weights: FeatureWeights = None,
    trust: Trust = False,
    feature_precision: FeaturePrecision = "fp32",
    workers: Workers = 2,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write the statistics of a data set, which EDM's and clean-fid's tools read too.

    `cmtool eval reference cifar-10-python.tar.gz -o cifar10.npz`

    `cmtool eval reference faces.zip -o faces-clean.npz --protocol clean --keep-features`

    The file says of which protocol it is, and eval refuses to mix two.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: statistics are an npz", "end it with .npz")
    check_free(out, overwrite)
    if Path(data).resolve() == out.resolve():
        raise UserError(f"--out {out} is the data itself", "give another --out")
    make_folder(out.parent)

    from cmtool.evaluation.measure import Needs, save_reference, set_of
    from cmtool.system import dist

    where = pick_device(device)
    rank, world_size = processes()
    group = dist.join(rank, world_size, where, TIMEOUT)
    try:
        setting = make_setting(
            protocol or usual_protocol("fid", data), feature_weights, trust,
            feature_precision, where, batch, workers, group,
        )  # fmt: skip
        sample, facts = set_of(
            data, Needs(True, keep_features), setting, num=num, tell=ticker("images")
        )
        if group.leads:
            save_reference(out, sample, facts, setting, __version__)
    except RuntimeError as error:
        raise dist.lost_contact(error, group, 0) or error from None
    finally:
        dist.leave()
    say(f"{sample.num:,} images")
    emit(os.fspath(out))


app.command("consistency")(consistency)
