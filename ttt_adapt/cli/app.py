"""The `ttt-adapt` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ttt_adapt.errors import ConfigError, TTTAdaptError, missing

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:  # the core does not need them
    raise missing("typer or rich", "cli") from error

if TYPE_CHECKING:
    import torch

    from ttt_adapt.config import StreamConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make an existing vision model keep learning from the video it is watching.",
)
console = Console()

_ARMS = "fixed,no-memory,implicit,explicit,online"

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Seed of masks and draws.")]
Preset = Annotated[str, typer.Option(help="online, paper, no-memory, implicit or explicit.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a field of StreamConfig; repeatable.")
]
Size = Annotated[str | None, typer.Option(metavar="HxW", help="Resize frames for the model, such as 144x192.")]
TestBranch = Annotated[
    list[str] | None,
    typer.Option(
        "--branch",
        metavar="NAME=VALUE",
        help="mask_ratio, loss_on or norm_pix_loss at test time.",
    ),
]
BranchSettings = Annotated[
    list[str] | None,
    typer.Option("--branch", metavar="NAME=VALUE", help="A keyword of MAEBranch.attach, such as mask_ratio=0.75."),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("ttt-adapt-demo"),
    frames: Annotated[int, typer.Option(min=2, help="Length of the stream.")] = 240,
    seed: Seed = 0,
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Watch a small model adapt to a street that drifts from clear day to dusk, fog and rain."""
    from ttt_adapt.cli.options import parse_settings
    from ttt_adapt.evaluation.demo import CONFIG
    from ttt_adapt.evaluation.demo import demo as run_demo
    from ttt_adapt.evaluation.report import rich_table

    config = CONFIG.replace(**{"seed": seed, **parse_settings(settings or [])})
    report = run_demo(out, frames, seed, config, _device(device))
    console.print(rich_table(report, width=console.width))
    _say(f"side-by-side video: {out / 'demo.mp4'}\nloss and mIoU over time: {out / 'stream.png'}")


@app.command()
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
    recipe: Annotated[str, typer.Option(help="joint: main task, then joint. main: main task twice. probe.")] = "joint",
    first_epochs: Annotated[int, typer.Option(min=0, metavar="N", help="Epochs of the recipe's first stage.")] = 40,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Epochs of the recipe's last stage.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images per batch.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, metavar="N", help="Batches per update.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    mae_weight: Annotated[float, typer.Option(help="Weight of the reconstruction loss.")] = 1.0,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Start from timm's pretrained encoder.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run stopped.")] = False,
    half: Annotated[bool, typer.Option(help="Store weights as float16.")] = False,
    workers: Annotated[int, typer.Option(min=0, metavar="N", help="Processes that load data.")] = 0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train a timm encoder and a head for a task, jointly with the reconstruction branch."""
    from ttt_adapt.cli.options import branch_settings, parse_settings, parse_size
    from ttt_adapt.training.joint import TrainConfig
    from ttt_adapt.training.recipe import TrainOptions
    from ttt_adapt.training.recipe import train as run_training

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
    run_training(
        TrainOptions(
            data=data,
            out=out,
            encoder=encoder,
            encoder_options=parse_settings(encoder_option or [], "img_size=224"),
            objective=objective,
            branch=branch_settings(branch or []),
            clips=_names(clips),
            classes=_names(classes),
            size=parse_size(size),
            stills=stills,
            recipe=recipe,
            first_epochs=first_epochs,
            init=init,
            pretrained=pretrained,
            resume=resume,
            half=half,
            device=device,
            config=config,
            task=task,
            task_options=parse_settings(task_option or [], "mode=classification"),
        )
    )
    _say(f"wrote {out}")


@app.command()
def run(
    video: Annotated[str, typer.Argument(help="Video file, folder of frames, camera index, or URL.")],
    checkpoint: Annotated[Path, typer.Option(help="A file of `ttt-adapt train`.")] = Path("model.safetensors"),
    out: Annotated[Path, typer.Option(help="The mp4 to write.")] = Path("out.mp4"),
    task: Annotated[str | None, typer.Option(help="What the checkpoint is for; it knows itself.")] = None,
    view: Annotated[str, typer.Option(help="overlay, or panels (frame, fixed, adapted, reconstruction).")] = "overlay",
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size for the model; 'native' for the video's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames.")] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second of the mp4; by default the video's own, 25 for a folder.")
    ] = None,
    preset: Preset = "online",
    settings: Settings = None,
    branch: TestBranch = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Adapt a trained model to a video, frame by frame, and write what it sees."""
    from ttt_adapt.cli.options import parse_settings, parse_size
    from ttt_adapt.evaluation.film import RunOptions
    from ttt_adapt.evaluation.film import run as run_video
    from ttt_adapt.view.terminal import counted

    options = RunOptions(
        source=video,
        checkpoint=checkpoint,
        out=out,
        view=view,
        size=parse_size(size),
        native=size == "native",
        limit=limit,
        fps=fps,
        device=_device(device),
        config=_config(preset, settings, seed),
        branch=parse_settings(branch or [], "mask_ratio=0.75"),
        task=task,
    )
    count = run_video(options)
    _say(f"wrote {counted(count, 'frame')} to {out}")


@app.command(name="eval")
def evaluate(
    data: Annotated[
        str, typer.Argument(help="Folder of labelled clips (of colorization, pictures or videos), or 'street'.")
    ],
    checkpoint: Annotated[list[Path], typer.Option(help="Jointly trained checkpoint; repeat it, one per seed.")],
    baseline: Annotated[
        list[Path] | None, typer.Option(help="Checkpoint trained for the main task alone; one per seed.")
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help=f"Comma-separated arms; by default {_ARMS.replace(',', ', ')}.")
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="memory, window, smoothness, iterations or mask-ratio, instead of --arms.")
    ] = None,
    clips: Annotated[str, typer.Option(help="Comma-separated names of the clips; all by default.")] = "",
    format: Annotated[str, typer.Option(help="auto, folder, davis, kitti-step, cityscapes or coco.")] = "auto",
    classes: Annotated[str, typer.Option(help="Comma-separated class names, where the data bring none.")] = "",
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size of the frames; the checkpoint's by default, or 'native'.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds of adaptation.")] = "0",
    seed: Annotated[int | None, typer.Option(min=0, help="Which street, for 'street'; 0 by default.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the stream, for 'street'; 240.")] = None,
    real_time: Annotated[
        bool, typer.Option("--real-time", help="An arm misses the frames that go by while it is busy.")
    ] = False,
    forwards: Annotated[
        list[str] | None,
        typer.Option(metavar="ARM=R", help="Forward passes per frame for --real-time; measured by default."),
    ] = None,
    metric_weights: Annotated[
        Path | None, typer.Option(help="Folder with the networks of LPIPS, FID and Inception Score; never downloaded.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json, table.md and plots.")] = Path("ttt-adapt-eval"),
    preset: Preset = "online",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[ARM.]NAME=VALUE",
            help="Change a field of StreamConfig, for all arms or one of them (tent.lr=1e-3); repeatable.",
        ),
    ] = None,
    branch: TestBranch = None,
    device: Device = "auto",
) -> None:
    """Compare arms on clips: tables, a JSON and plots."""
    from ttt_adapt.cli.options import parse_settings, parse_size, per_arm
    from ttt_adapt.evaluation.report import rich_table
    from ttt_adapt.evaluation.rows import clips_from, contenders_of, real_time_of
    from ttt_adapt.evaluation.session import check_failures
    from ttt_adapt.evaluation.session import evaluate as run_evaluation
    from ttt_adapt.evaluation.studies import find_study
    from ttt_adapt.evaluation.study_session import run_study
    from ttt_adapt.tasks.checkpoint import read_spec

    if study is not None and (arms is not None or baseline):
        raise ConfigError("--study brings its own rows: leave out --arms and --baseline")
    chosen = None if study is None else find_study(study)
    common, own = per_arm(settings or [])
    if chosen is not None and own:
        raise ConfigError(
            f"--set {next(iter(own))}.…: a study brings its own rows; --set NAME=VALUE changes all of them"
        )
    hidden = parse_settings(branch or [], "mask_ratio=0.75")
    names = _names(_ARMS if arms is None else arms) if chosen is None else tuple(s.arm for s in chosen.settings(1))
    rows = contenders_of(names, checkpoint, baseline or [], own, hidden) if chosen is None else []
    numbers = _seeds(seeds, checkpoint, baseline or [])
    charged = real_time_of(real_time, forwards or [], names)
    spec = read_spec(checkpoint[0])
    found = clips_from(
        data,
        _names(clips),
        parse_size(size) if size else spec.size,
        format=format,
        classes=_names(classes),
        default_classes=spec.classes,
        seed=seed,
        frames=frames,
        task=spec.task,
    )
    config, where = _config(preset, common, 0), _device(device)
    if chosen is None:
        report = run_evaluation(
            rows, found, config, numbers, out, where, real_time=charged, metric_weights=metric_weights
        )
    else:
        report = run_study(chosen, checkpoint, found, config, numbers, out, where, charged, hidden, metric_weights)
    console.print(rich_table(report, width=console.width))
    _say(f"report, tables and plots: {out}")
    check_failures(report, out)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="timm model name, or a checkpoint.")],
    encoder: Annotated[str | None, typer.Option(help="Dotted path of the module where the encoder ends.")] = None,
    branch: BranchSettings = None,
    size: Size = None,
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Show what would be adapted in a model and what a step costs."""
    from ttt_adapt.cli.options import branch_settings, parse_size
    from ttt_adapt.evaluation.model_info import inspect_model

    found = inspect_model(
        model,
        encoder=encoder,
        size=parse_size(size),
        attach=branch_settings(branch or []),
        config=_config("online", settings, 0),
        device=_device(device),
    )
    table = Table(title=escape(model), show_header=False)
    for what, value in found.rows:
        table.add_row(what, escape(value))
    console.print(table)


def _config(preset: str, settings: list[str] | None, seed: int) -> StreamConfig:
    from ttt_adapt.cli.options import stream_config

    return stream_config(preset, settings or [], seed)


def _device(name: str) -> torch.device:
    from ttt_adapt.cli.options import pick_device

    return pick_device(name)


def _say(text: str) -> None:
    """Plain text, whatever brackets its paths hold, and never folded."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _seeds(text: str, *checkpoints: list[Path]) -> list[int]:
    numbers = [_seed(part) for part in _names(text)]
    for files in checkpoints:
        if len(files) > 1 and len(files) != len(numbers):
            raise ConfigError(f"{len(files)} checkpoints for {len(numbers)} seeds; expected one, or one per seed")
    return numbers


def _seed(text: str) -> int:
    from ttt_adapt.cli.options import whole_number

    number = whole_number(text)
    if number is None:
        raise ConfigError(f"seed {text!r} is no whole number; expected seeds such as 0,1,2")
    return number


def _hand_over(entry: EntryPoint) -> Callable[[typer.Context], None]:
    """A command that gives its arguments to an integration's own parser, loaded when it is called."""

    def call(context: typer.Context) -> None:
        command = typer.main.get_command(entry.load())
        status = command.main(context.args, context.command_path, standalone_mode=False)
        if status:  # Click returns it instead of leaving
            raise typer.Exit(status)

    return call


for _entry in entry_points(group="ttt_adapt.cli"):
    app.command(
        _entry.name,
        help=f"{_entry.module.split('.')[0]}: see 'ttt-adapt {_entry.name} --help'.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )(_hand_over(_entry))


def main() -> None:
    """Entry point: expected errors are one line on standard error and exit status 1; Ctrl-C is 130."""
    errors = Console(stderr=True)
    try:
        app()
    except (TTTAdaptError, OSError) as error:
        line = " ".join(str(error).split())
        errors.print(f"[bold red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:  # what Typer makes of Ctrl-C
            errors.print("interrupted")
        raise


if __name__ == "__main__":
    main()
