"""What a model is like on its own ground: `Calibration`, with its file, and what it means for a configuration.

How frames are corrected by it is in `ttt_adapt.model.rule`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import CheckpointError, ConfigError, missing
from ttt_adapt.file_kind import refuse_other_kind
from ttt_adapt.files import atomic_write, check_path, check_place, read_small
from ttt_adapt.model.calibration_file import FORMAT, TENSORS, read_saved
from ttt_adapt.model.fingerprint import is_same_model
from ttt_adapt.model.rule import PointStatistics, Rule

HALVES = frozenset({torch.float16, torch.bfloat16})
"""Precisions of half a float32."""


@dataclass(frozen=True, repr=False)
class Calibration:
    """What a model is like on its own ground. Make one with `ttt_adapt.calibrate` or `MAEBranch.calibrate`.

    Attributes:
        statistics: kind of points -> name of a point -> what the source stills are like there.
        rule: how a pass is corrected.
        fingerprint: of the weights that were calibrated (`fingerprint_of`).
        stills: how many source stills were measured.
        size: (H, W) of the stills as the model takes them.
        drifts: the drift of every still in a pass that the rule corrects (`Correction.drift`), as a stream sees it.
        loss: mean and standard deviation over the stills of the reconstruction loss; None without a branch.
        settings: fields of `StreamConfig` that were chosen for this model; the presets take them over.
        record: how rule and settings were chosen, in plain values, for people.
        rounded: the fingerprint of the weights in bfloat16, by which a copy in bfloat16 is known.
    """

    statistics: Mapping[str, Mapping[str, PointStatistics]]
    rule: Rule
    fingerprint: str
    stills: int
    size: tuple[int, int]
    drifts: tuple[float, ...] = ()
    loss: tuple[float, float] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    rounded: str = ""

    def __post_init__(self) -> None:
        if absent := [kind for kind in self.rule.kinds if not self.statistics.get(kind)]:
            known = ", ".join(self.statistics) or "none"
            raise ConfigError(f"the rule corrects {absent[0]!r}, and this model has no such points; it has {known}")

    @property
    def points(self) -> Mapping[tuple[str, str], PointStatistics]:
        """(kind, name) -> statistics, for the points of the rule."""
        return {(kind, name): each for kind in self.rule.kinds for name, each in self.statistics.get(kind, {}).items()}

    @property
    def usual_drift(self) -> float:
        """The mean drift of the stills: the unit of `StreamAdapter.drift`."""
        return sum(self.drifts) / len(self.drifts) if self.drifts else 1.0

    @property
    def limit(self) -> float:
        """The drift, in units of the usual one, up to which a frame counts as usual: 95 % of the stills stay below."""
        if not self.drifts:
            return float("inf")
        highest = float(torch.tensor(self.drifts, dtype=torch.float64, device="cpu").quantile(0.95))
        return highest / max(self.usual_drift, 1e-12)

    @property
    def distance(self) -> float | None:
        """How far the stills are from the data that the model was trained on: the divergence of all stills together
        from the running statistics, mean over the BatchNorm layers; None for a model without."""
        layers = [float(each.layer_shift) for each in self.statistics.get("batchnorm", {}).values()]
        return sum(layers) / len(layers) if layers else None

    def __repr__(self) -> str:
        points = " + ".join(f"{len(each)} {kind}" for kind, each in self.statistics.items())
        return (
            f"Calibration({self.stills} stills of {self.size}, points: {points}, {self.rule}, limit={self.limit:.3g})"
        )

    def replace(self, **changes: Any) -> Calibration:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def settings_beside(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings chosen for this model that go together with fields of `StreamConfig` that somebody gives.

        Given fields win. The gate "calibrated" is left out where they name other statistics, or window="auto", with
        which it cannot be.
        """
        own = {name: value for name, value in self.settings.items() if name not in given}
        other = given.get("norm_stats", "auto") not in ("auto", "calibrated") or given.get("window") == "auto"
        if other and own.get("gate") == "calibrated":
            del own["gate"]
        return own

    def settle(self, config: StreamConfig, given: Collection[str] = ()) -> StreamConfig:
        """`config` with the settings chosen for this model, where it has the values of the preset `online`.

        Args:
            config: of a stream.
            given: names of fields that somebody gave: they stay as they are, also where their values are the preset's.
        """
        preset = StreamConfig.online()
        kept = {name: v for name, v in vars(config).items() if name in given or v != getattr(preset, name)}
        return config.replace(**self.settings_beside(kept))

    def check(self, model: nn.Module) -> None:
        """Check that this is a calibration of the model's weights, as they are or in another precision.

        Raises:
            ConfigError: it is of others.
        """
        if is_same_model(model, self.fingerprint, self.rounded):
            return
        halves = {tensor.dtype for tensor in model.state_dict().values() if isinstance(tensor, Tensor)} & HALVES
        raise ConfigError(
            f"the calibration is of other weights than those of this {type(model).__name__}: calibrate the model again "
            "after it was trained, or load the weights that were calibrated"
            + (". A calibration of the model in float32 fits its copies in float16 and in bfloat16" if halves else "")
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, on the CPU, for a file; `of_tensors` reads them back with `to_json`."""
        return {
            f"{kind}/{name}/{part}": getattr(statistics, part).cpu()
            for kind, points in self.statistics.items()
            for name, statistics in points.items()
            for part in TENSORS
        }

    def to_json(self) -> str:
        """All that is not a tensor, as text."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "statistics"}
        places = {
            kind: {name: [each.layout, each.prefix] for name, each in points.items()}
            for kind, points in self.statistics.items()
        }
        return json.dumps({"format": FORMAT, **plain, "rule": dataclasses.asdict(self.rule), "places": places})

    @property
    def digest(self) -> str:
        """A hash of everything that a corrected pass depends on."""
        digest = hashlib.sha256(repr((self.rule, self.fingerprint)).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], text: str, source: str = "the calibration") -> Calibration:
        """What `tensors` and `to_json` wrote.

        Raises:
            CheckpointError: they do not belong together, or a later version wrote them.
        """
        plain = read_saved(text, tensors, source)
        try:
            plain["rule"] = Rule(**plain["rule"])
            plain["size"], plain["drifts"] = tuple(plain["size"]), tuple(plain["drifts"])
            plain["loss"] = None if plain["loss"] is None else tuple(plain["loss"])
            statistics = {
                kind: {
                    name: PointStatistics(
                        layout, prefix, **{part: tensors[f"{kind}/{name}/{part}"].float() for part in TENSORS}
                    )
                    for name, (layout, prefix) in places.items()
                }
                for kind, places in plain.pop("places").items()
            }
            StreamConfig.online(**plain["settings"])
            return cls(statistics=statistics, **plain)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{source} is no calibration that ttt_adapt wrote: {error}") from error

    def to_bytes(self) -> bytes:
        """The content of a .safetensors file."""
        return bytes(_safetensors().save(self.tensors(), {"calibration": self.to_json()}))

    @classmethod
    def of_bytes(cls, data: bytes, source: str = "the calibration") -> Calibration:
        """What `to_bytes` made.

        Raises:
            CheckpointError: it is something else.
        """
        library = _safetensors()
        try:
            tensors = library.load(data)
            length = int.from_bytes(data[:8], "little")
            text = json.loads(data[8 : 8 + length])["__metadata__"]["calibration"]
        except Exception as error:  # broken data can raise any error
            raise CheckpointError(
                f"{source} is no calibration that ttt_adapt wrote ({type(error).__name__}: {error})"
            ) from error
        return cls.of_tensors(tensors, text, source)

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file. An existing file stays as it is until the new one is complete.

        Raises:
            CheckpointError: the file cannot be written.
        """
        check_path(path, "calibration", CheckpointError)
        data = self.to_bytes()
        folder = Path(path).parent
        try:
            check_place(Path(path), "path")
        except ConfigError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error
        if not folder.exists():
            raise CheckpointError(f"{path} cannot be written: there is no folder {folder}; make it first")
        try:
            with atomic_write(path) as part:
                part.write_bytes(data)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            CheckpointError: there is no such file, or it holds something else.
        """
        check_path(path, "calibration", CheckpointError)
        if not Path(path).exists():
            raise CheckpointError(f"there is no calibration {path}: make one with `ttt-adapt calibrate`")
        refuse_other_kind(path, ("calibration", "safetensors"), "no calibration", CheckpointError)
        return cls.of_bytes(read_small(path, CheckpointError), str(path))


def settled_config(config: StreamConfig | None, calibration: Calibration | None) -> StreamConfig:
    """The configuration that a stream runs with, without "auto" in `norm_stats`.

    Args:
        config: the caller's; None: the default.
        calibration: of the model, or None.

    Raises:
        ConfigError: it is no configuration, or it needs a calibration and there is none.
    """
    if calibration is not None and not isinstance(calibration, Calibration):
        raise ConfigError(
            f"calibration is a {type(calibration).__name__}; expected what calibrate(model, stills) returned"
        )
    if config is None:
        config = StreamConfig() if calibration is None else StreamConfig.online(**calibration.settings)
    if not isinstance(config, StreamConfig):
        raise ConfigError(f"config is a {type(config).__name__}; expected a StreamConfig")
    if config.gate == "calibrated" and (calibration is None or not calibration.drifts):
        raise ConfigError(
            'gate is "calibrated", and this model has no calibration with the drifts of its stills: make one with '
            "branch.calibrate(stills) or calibrate(model, stills)"
        )
    if config.norm_stats == "auto":
        return config.replace(norm_stats="frozen" if calibration is None else "calibrated")
    if config.norm_stats == "calibrated" and calibration is None:
        raise ConfigError(
            'norm_stats is "calibrated", and this model has no calibration: make one with '
            "branch.calibrate(stills), or pass calibration=calibrate(model, stills)"
        )
    return config


def default_rule(kinds: Mapping[str, Any]) -> Rule:
    """The rule of a model that was measured and not chosen for: at the first of these kinds of points that it has.

    Args:
        kinds: kinds of points that the model has, "batchnorm", "blocks" or "norms".
    """
    for kind in ("batchnorm", "blocks", "norms", "input"):
        if kinds.get(kind):
            return Rule(kind)
    return Rule("none")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise missing("safetensors", "timm") from error
    return safetensors.torch
