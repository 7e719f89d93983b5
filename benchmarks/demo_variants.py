"""How the demo's settings are chosen: learning rate and pull on streets that the demo does not show.

    python benchmarks/demo_variants.py

Four rendered streets (demo seeds 50 to 53), one table. The rule, fixed before the table was made: the setting with the
highest mean mIoU over the four. `benchmarks/demo_streets.py` reports streets 100 to 109, which nothing is tuned on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ttt_adapt import StreamConfig
from ttt_adapt.arms import ARMS
from ttt_adapt.data.street import WEIGHTS, StreetClip
from ttt_adapt.evaluation.run_arm import run_arm
from ttt_adapt.tasks.checkpoint import load_checkpoint

FRAMES = 240
SETTINGS = [(lr, pull) for lr in (3e-5, 1e-4) for pull in (0.0, 0.02, 0.05, 0.2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[50, 51, 52, 53])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo-variants.md")
    options = parser.parse_args()
    checkpoint = load_checkpoint(WEIGHTS)
    streets = [list(StreetClip(seed, FRAMES, checkpoint.spec.size)) for seed in options.seeds]
    rows = [f"| setting | {' | '.join(f'street {seed}' for seed in options.seeds)} | mean |"]
    rows.append("|---|" + "---:|" * (len(streets) + 1))
    means: dict[str, float] = {}
    variants = {f"lr {lr:g}, pull {pull:g}": StreamConfig.online(lr=lr, source_pull=pull) for lr, pull in SETTINGS}
    for title, config in {"fixed": StreamConfig.online(), **variants}.items():
        arm = ARMS["fixed" if title == "fixed" else "online"]
        found = [run_arm(arm, checkpoint, street, config, name="street").scores["miou"] for street in streets]
        means[title] = sum(found) / len(found)
        rows.append(f"| {title} | " + " | ".join(f"{100 * value:.2f}" for value in [*found, means[title]]) + " |")
        print(rows[-1], flush=True)
        options.out.write_text("\n".join(rows) + f"\n\nBy the rule: {max(means, key=means.__getitem__)}.\n")


if __name__ == "__main__":
    main()
