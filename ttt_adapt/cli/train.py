"""`ttt-adapt train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ttt_adapt.cli.language import Command
from ttt_adapt.cli.options import (
    BranchSettings,
    Device,
    Overwrite,
    Seed,
    Size,
    branch_keywords,
    parse_classes,
    parse_names,
    parse_settings,
    parse_size,
    pick_device,
)
from ttt_adapt.cli.output import say
from ttt_adapt.errors import ConfigError


class TrainCommand(Command):
    """`train`, whose `--pretrained` used to stand alone: without a source, the error says which there are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Typer does it, once `--pretrained` is found to have a source.

        Raises:
            ConfigError: it has none.
        """
        for option, value in zip(args, [*args[1:], "-"], strict=True):
            if option == "--pretrained" and value.startswith("-"):
                from ttt_adapt.tasks.pretrained import FORMS

                raise ConfigError(f"--pretrained comes without a source; {FORMS}")
        return super().parse_args(ctx, args)


def train(
    data: Annotated[
        str, typer.Argument(help="Folder of clips or stills with labels (for colorization any pictures), or 'street'.")
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint to write, .safetensors.")] = Path("model.safetensors"),
    task: Annotated[str, typer.Option(help="segmentation, or colorization.")] = "segmentation",
    task_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Of colorization: mode=classification, temperature, uniform; repeatable."
        ),
    ] = None,
    encoder: Annotated[str, typer.Option(help="timm model name.")] = "vit_tiny_patch16_224",
    encoder_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Keyword of timm.create_model; repeatable.")
    ] = None,
    objective: Annotated[str, typer.Option(help="What is trained jointly: mae, or rotation.")] = "mae",
    branch: BranchSettings = None,
    clips: Annotated[str, typer.Option(help="Comma-separated names of the clips to train on; all by default.")] = "",
    classes: Annotated[str, typer.Option(help="Comma-separated class names, where the data bring none.")] = "",
    size: Size = None,
    stills: Annotated[int, typer.Option(min=1, metavar="N", help="Images rendered for 'street'.")] = 400,
    recipe: Annotated[
        str,
        typer.Option(
            help="joint: main task, then joint. main: main task twice. branch: main, then branch alone. probe."
        ),
    ] = "joint",
    first_epochs: Annotated[int, typer.Option(min=0, metavar="N", help="Epochs of the recipe's first stage.")] = 40,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Epochs of the recipe's last stage.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images per batch.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, metavar="N", help="Batches per update.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    mae_weight: Annotated[float, typer.Option(help="Weight of the reconstruction loss.")] = 1.0,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Weights that the encoder starts from: timm (downloads), a file, or package:efficientnet-lite0.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run stopped.")] = False,
    overwrite: Overwrite = False,
    half: Annotated[bool, typer.Option(help="Store weights as float16.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Calibrate the trained model on its own stills.")
    ] = True,
    workers: Annotated[int, typer.Option(min=0, metavar="N", help="Processes that load data.")] = 0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train a timm encoder and a head for a task, jointly with the reconstruction branch."""
    from ttt_adapt.training.joint import TrainConfig
    from ttt_adapt.training.recipe import train as train_recipe

    config = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        lr=lr,
        mae_weight=mae_weight,
        precision=precision,
        workers=workers,
        seed=seed,
    )
    made = train_recipe(
        data,
        out,
        encoder=encoder,
        encoder_options=parse_settings(encoder_option, "img_size=224"),
        objective=objective,
        branch=branch_keywords(branch),
        clips=parse_names(clips),
        classes=parse_classes(classes),
        size=parse_size(size),
        stills=stills,
        recipe=recipe,
        first_epochs=first_epochs,
        init=init,
        pretrained=pretrained,
        resume=resume,
        overwrite=overwrite,
        half=half,
        calibrate=calibrate,
        device=pick_device(device),
        config=config,
        task=task,
        task_options=parse_settings(task_option, "mode=classification"),
    )
    say(f"wrote {out}")
    name = shlex.quote(str(out))
    ready = made.branch is not None or made.calibration is not None
    say(f"next: ttt-adapt run VIDEO --checkpoint {name}" if ready else f"next: ttt-adapt calibrate {name} STILLS")
