"""Learning results on real driving video: train on CamVid's daylight stills, stream clips that training never saw.

    python benchmarks/camvid.py --data PATH_TO_CAMVID                     # ViT and RegNet, 3 seeds
    python benchmarks/camvid.py --data PATH_TO_CAMVID --models convnext

For each seed a model is trained from scratch for the main task; from there two trainings of equal length and equal
augmentation go on, one with the main task alone ("Main Task Only"), one jointly with the reconstruction. All arms
stream the 15 Hz clip and the dusk clip at 144 x 192. Hyper-parameters of adaptation are chosen on the 15 Hz clip, as it
is and artificially darkened (`camvid_variants.py`).

Everything goes on where it stopped when the command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ttt_adapt import StreamConfig
from ttt_adapt.commands.evaluate import Contender, evaluate
from ttt_adapt.commands.train import TrainOptions, train
from ttt_adapt.data import open_clips
from ttt_adapt.joint import TrainConfig

TRAIN = ("0006R0_train_a", "0016E5_train_a", "0016E5_train_b", "0016E5_train_d")
STREAMS = ("0016E5_val_c", "0001TP_train_a")
SIZE = (144, 192)
ARMS = {"no-memory": "TTT-MAE No Memory", "online": "Online TTT-MAE"}
NORM_ARMS = {"norm-ema": "BatchNorm EMA, forward only", "online-norm-ema": "Online TTT-MAE + BatchNorm EMA"}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"encoder": "vit_tiny_patch16_224", "options": {"depth": 4}, "epochs": 25, "arms": ARMS},
    "regnet": {"encoder": "regnetx_002", "options": {}, "epochs": 16, "arms": ARMS | NORM_ARMS},
    "convnext": {"encoder": "convnext_atto", "options": {}, "epochs": 12, "arms": ARMS},
}


def checkpoints(
    name: str,
    seed: int,
    data: Path,
    stem: Path,
    clips: tuple[str, ...] = TRAIN,
    size: tuple[int, int] = SIZE,
) -> tuple[Path, Path]:
    """Train what is missing; returns the files of (Main Task Only, joint), which begin with `stem`."""
    model = MODELS[name]
    options = model["options"] | ({"img_size": size} if name == "vit" else {})
    first, main, joint = (Path(f"{stem}-{part}.safetensors") for part in ("first", "main", "joint"))
    for out, recipe, init in ((first, "main", None), (main, "main", first), (joint, "joint", first)):
        if out.exists():
            continue
        train(
            TrainOptions(
                data=str(data),
                out=out,
                encoder=model["encoder"],
                encoder_options=options,
                clips=clips,
                size=size,
                recipe=recipe,
                first_epochs=0,
                init=init,
                resume=True,
                device="cpu",
                config=TrainConfig(epochs=model["epochs"], seed=seed),
            )
        )
    return main, joint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds CamVid's clips and index.json")
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=["vit", "regnet"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"), help="folder for the reports")
    options = parser.parse_args()
    clips = open_clips(options.data, STREAMS, SIZE)
    for name in options.models:
        pairs = [checkpoints(name, seed, options.data, options.weights / f"{name}-{seed}") for seed in options.seeds]
        joint = tuple(pair[1] for pair in pairs)
        rows = [
            Contender("fixed", "MAE Joint Training (fixed)", joint),
            Contender("fixed", "Main Task Only (fixed)", tuple(pair[0] for pair in pairs)),
            *(Contender(arm, title, joint) for arm, title in MODELS[name]["arms"].items()),
        ]
        evaluate(rows, clips, StreamConfig.online(), options.seeds, options.out / f"camvid-{name}")


if __name__ == "__main__":
    main()
