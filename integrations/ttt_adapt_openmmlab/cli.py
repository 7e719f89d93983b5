"""`ttt-adapt mm train|test|check`: MMEngine's own runner on a config.

Several processes are started as in OpenMMLab's own tools; on a machine without CUDA they communicate by gloo:

    torchrun --nproc-per-node 2 -m ttt_adapt mm test CONFIG CHECKPOINT --launcher pytorch
    srun --ntasks 8 --gres gpu:8 ttt-adapt mm test CONFIG CHECKPOINT --launcher slurm

To test on videos by several processes, the config sets `test_dataloader.sampler=dict(type='VideoSampler')`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train, test and check data of OpenMMLab configs.")

_CONFIGS = (".py", ".yaml", ".yml", ".json")


class MMCommand(TyperCommand):
    """A command with MMEngine's own option syntax: `--cfg-options a=1 b=2`, and `--resume` with or without a path."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Rewrite both options as a plain parser takes them, and parse."""
        return super().parse_args(ctx, _plain(list(args)))


def _plain(args: list[str]) -> list[str]:
    """One option for each value of --cfg-options; `auto` behind a --resume without a path."""
    out: list[str] = []
    while args:
        arg = args.pop(0)
        out.append(arg)
        if arg == "--cfg-options":
            out += args[:1]
            del args[:1]
            while args and "=" in args[0] and not args[0].startswith("-"):
                out += [arg, args.pop(0)]
        elif arg == "--resume" and (not args or args[0].startswith("-") or args[0].endswith(_CONFIGS)):
            out.append("auto")
    return out


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="An MMEngine config; it inherits with _base_.")]
WorkDir = Annotated[
    Path | None,
    typer.Option("--work-dir", "--out", help="Folder for logs, results and checkpoints; ./work_dirs/<config>."),
]
CfgOptions = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE ...", help="Change the config, such as model.branch.mask_ratio=0.75 'a=[1,2]'."),
]
Launcher = Annotated[str, typer.Option(help="none, pytorch, slurm or mpi.")]
LocalRank = Annotated[int | None, typer.Option("--local-rank", "--local_rank", hidden=True)]


@app.command("train", cls=MMCommand)
def run_training(
    config: ConfigFile,
    work_dir: WorkDir = None,
    resume: Annotated[
        str | None, typer.Option(metavar="[auto|PATH]", help="Go on from the latest checkpoint, or from this one.")
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Mixed precision; needs a GPU.")] = False,
    cfg_options: CfgOptions = None,
    launcher: Launcher = "none",
    local_rank: LocalRank = None,
) -> None:
    """Train by a config."""
    from ttt_adapt_openmmlab.launch import run
    from ttt_adapt_openmmlab.run_config import read_config, set_amp, set_resume

    cfg = read_config(config, work_dir, cfg_options or [])
    if amp:
        set_amp(cfg)
    if resume is not None:
        set_resume(cfg, resume)
    run(cfg, "train", launcher, local_rank)


@app.command("test", cls=MMCommand)
def run_test(
    config: ConfigFile,
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[CHECKPOINT]", help="File or URL; the config's load_from by default.")
    ] = None,
    work_dir: WorkDir = None,
    arm: Annotated[
        str | None,
        typer.Option(help="fixed, calibrated, no-memory, implicit, explicit, online, paper or offline."),
    ] = None,
    show_dir: Annotated[Path | None, typer.Option(help="Folder for painted predictions.")] = None,
    cfg_options: CfgOptions = None,
    launcher: Launcher = "none",
    local_rank: LocalRank = None,
) -> None:
    """Test by a config, with test-time training where it has an OnlineTTTHook or an arm is named."""
    from ttt_adapt_openmmlab.launch import run
    from ttt_adapt_openmmlab.run_config import read_config, set_arm, set_checkpoint, set_show_dir

    cfg = read_config(config, work_dir, cfg_options or [])
    if checkpoint is not None:
        set_checkpoint(cfg, checkpoint)
    if arm is not None:
        set_arm(cfg, arm)
    if show_dir is not None:
        set_show_dir(cfg, show_dir)
    run(cfg, "test", launcher, local_rank)


@app.command("check")
def check_data(
    name: Annotated[str, typer.Argument(help="camvid, kitti-step, coco-videos, cityscapes or coco.")],
    path: Annotated[Path, typer.Argument(help="The folder that configs name as data_root.")],
) -> None:
    """Say what is missing or wrong in a downloaded data set; exit status 1 if anything is."""
    from ttt_adapt_openmmlab.datasets.check import check_tree

    problems = check_tree(name, path)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{path}: no problem found in this {name}")
