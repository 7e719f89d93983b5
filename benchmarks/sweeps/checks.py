"""What is checked of every model, in this order; each check raises `Broken` with the reason, or passes.

A model *works as suggested* if the library attaches a branch without being told where the encoder ends, and all
checks pass. It *works with a named path* if it needs a path, which `candidate_paths` guesses. It is *refused* if the
library raises its own error for every path. It *does not build* if its own library cannot make it here. All else
*fails*.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sweeps.subject import Snapshot, Subject, identical, leaves, same
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig, TTTAdaptError, calibrate

CONFIG = StreamConfig(window=2, batch_size=1, lr=1e-3)
CALIBRATED = CONFIG.replace(norm_stats="calibrated")
STILLS = 8
PATHS = 6
"""How many paths are tried where the suggestion is refused."""

AS_SUGGESTED, NAMED, REFUSED, FAILS, NOT_BUILT = "as suggested", "named path", "refused", "fails", "does not build"


class Broken(Exception):
    """A promise of the library does not hold for this model; the message says which."""


def check_model(subject: Subject) -> dict[str, Any]:
    """All checks of a model.

    Returns:
        status, encoder (the path), masking, size (H, W), maps (channels and stride of each), checks (name -> "ok" or
        what went wrong), and reason, where the suggestion does not work.
    """
    with statistics_of_images(subject.model):
        subject.run(batch=2)
    before = Snapshot.of(subject.model)
    found: dict[str, Any] = {"status": FAILS, "checks": {}}
    try:
        branch = MAEBranch.attach(subject.model, **subject.attach)
    except TTTAdaptError as error:
        found |= {"status": REFUSED, "reason": f"{type(error).__name__}: {error}"}
        if left := before.differences(subject.model):
            return found | {"status": FAILS, "reason": f"a refused attach left {', '.join(left)}"}
        return found | _with_named_path(subject, before)
    except Exception as error:
        return found | {"reason": told(error)}
    return found | _checked(subject, branch, before, AS_SUGGESTED)


@contextmanager
def statistics_of_images(model: nn.Module) -> Iterator[None]:
    """Inside the block, the layers with running statistics take those of the images that they see.

    With those of a new model, the values inside of a deep one with random weights vanish or overflow, which no trained
    model does.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momentum = [m.momentum for m in norms]
    for m in norms:
        m.train()
        m.momentum = None  # the mean of all passes
    try:
        yield
    finally:
        for m, own in zip(norms, momentum, strict=True):
            m.eval()
            m.momentum = own


def _with_named_path(subject: Subject, before: Snapshot) -> dict[str, Any]:
    """The result with the first path that can be attached to; nothing where there is none."""
    for path in candidate_paths(subject):
        try:
            branch = MAEBranch.attach(subject.model, path, **subject.attach)
        except Exception:
            continue
        found = _checked(subject, branch, before, NAMED)
        return {("with path" if key == "reason" else key): value for key, value in found.items()}
    return {}


def candidate_paths(subject: Subject) -> list[str]:
    """Paths of the modules that a pass leaves last and whose output may have a grid, the last one first."""
    left: list[str] = []

    def see(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if any((t.ndim == 4 and t.shape[-1] > 1) or (t.ndim == 3 and t.shape[1] > 1) for t in leaves(output)):
                left.append(name)

        return hook

    named = [(name, m) for name, m in subject.model.named_modules() if name and name.count(".") < 2]
    handles = [m.register_forward_hook(see(name)) for name, m in named]
    try:
        subject.run(left.clear)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(reversed(left)))[:PATHS]


def _checked(subject: Subject, branch: MAEBranch, before: Snapshot, status: str) -> dict[str, Any]:
    """Run all checks on an attached branch."""
    info, results = branch.info, {}
    for name, check in CHECKS.items():
        started = time.perf_counter()
        try:
            check(subject, branch, before)
            results[name] = "ok"
        except Exception as error:
            results[name] = told(error)
        results[f"{name} s"] = round(time.perf_counter() - started, 2)
    seconds = {name.removesuffix(" s"): results.pop(name) for name in list(results) if name.endswith(" s")}
    wrong = {name: text for name, text in results.items() if text != "ok" and not text.startswith("refused: ")}
    return {
        "status": FAILS if wrong else status,
        "encoder": info.path or "(the whole model)",
        "masking": branch.masking,
        "size": list(info.probe_size),
        "maps": [[m.channels, m.stride] for m in info.maps],
        "checks": results,
        "check_seconds": seconds,
        **({"reason": "; ".join(f"{name}: {text}" for name, text in wrong.items())} if wrong else {}),
    }


def check_attached(subject: Subject, branch: MAEBranch, before: Snapshot) -> None:
    """Attaching changes nothing in the model."""
    if left := before.differences(subject.model):
        raise Broken(f"attaching left {', '.join(left)}")


def check_masks(subject: Subject, branch: MAEBranch, before: Snapshot) -> None:
    """What the masks hide has no say in the prediction, and what they show has one."""
    images = branch.info.probe_images()
    mask = branch.draw_mask(images, torch.Generator().manual_seed(1))
    other = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).to(images)
    with branch.using(norm_pix_loss=False):  # else a patch gets back its own mean and deviation, hidden or not
        shown = branch.reconstruct(images, mask=mask)
        again = branch.reconstruct(images, mask=mask).prediction
        hidden = branch.reconstruct(torch.where(shown.mask, images, other), mask=mask).prediction
        seen = branch.reconstruct(torch.where(shown.mask, other, images), mask=mask).prediction
    if not bool(shown.prediction.isfinite().all()):
        raise Broken("the reconstruction is not finite")
    if not identical(shown.prediction, again):
        raise Broken("the same masked image is reconstructed differently each time")
    if not identical(shown.prediction, hidden):
        raise Broken(f"hidden pixels move the prediction by {(shown.prediction - hidden).abs().max():.3g}")
    if identical(shown.prediction, seen):
        raise Broken("visible pixels do not move the prediction")


def check_gradients(subject: Subject, branch: MAEBranch, before: Snapshot) -> None:
    """The loss is finite and has a gradient by parameters of the encoder and by all of the branch."""
    encoder = {name: p for name, p in branch.encoder_parameters().items() if p.requires_grad}
    parameters = {**encoder, **dict(branch.named_parameters())}
    loss = branch.loss(branch.info.probe_images(), generator=torch.Generator().manual_seed(3))
    if not bool(loss.isfinite()):
        raise Broken(f"the loss is {float(loss)}")
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    named = dict(zip(parameters, grads, strict=True))
    if lacking := [name for name, grad in named.items() if grad is None]:
        raise Broken(f"{len(lacking)} of {len(named)} parameters have no gradient, such as {lacking[0]}")
    if infinite := [name for name, grad in named.items() if not bool(grad.isfinite().all())]:
        raise Broken(f"{len(infinite)} gradients are not finite, such as that of {infinite[0]}")
    if not any(bool(named[name].any()) for name in encoder):
        raise Broken("all gradients of the encoder are 0")


def check_stream(subject: Subject, branch: MAEBranch, before: Snapshot) -> None:
    """Two frames are adapted to and predicted; then the model is as it was, bit for bit."""
    frames = subject.frames(branch.info.probe_size, 2)
    with StreamAdapter(subject.model, branch, config=CONFIG) as adapter:
        for frame in frames:
            finite(adapter.step(frame))
            if not adapter.last.adapted:
                raise Broken(f"frame {adapter.last.frame_index} was not adapted to: {adapter.last.reason}")
        encoder = branch.encoder_parameters()
        if all(identical(before.tensors[name][1], p.detach()) for name, p in encoder.items()):
            raise Broken("two steps moved no weight of the encoder")
        adapter.reset()
        reset = adapter.predict(frames[0])
    if left := before.differences(subject.model):
        raise Broken(f"detaching left {', '.join(left)}")
    with StreamAdapter(subject.model, branch, config=CONFIG) as adapter:
        if not same(reset, adapter.predict(frames[0])):
            raise Broken("after a reset the model predicts something else than at first")


def check_still(subject: Subject, branch: MAEBranch, before: Snapshot) -> None:
    """With a learning rate of 0, predictions are those of the plain model, bit for bit."""
    frame, seen = subject.frame(branch.info.probe_size, 0), list[Tensor]()

    def predict(x: Tensor, *_context: Any) -> Any:
        seen.append(x)
        return subject.model(x)

    with StreamAdapter(subject.model, branch, config=CONFIG.replace(lr=0.0), predict=predict) as adapter:
        prediction = adapter.step(frame)
    with torch.no_grad():
        plain = subject.model(seen[0])
    if not same(plain, prediction):
        raise Broken("with lr=0 the prediction differs from the plain model's")


def check_calibration(subject: Subject, branch: MAEBranch, before: Snapshot) -> None:
    """The model can be calibrated, and a calibrated stream predicts; then the model is as it was."""
    stills = subject.frames(branch.info.probe_size, STILLS)
    try:
        found = calibrate(subject.model, stills, choose=False)
    except TTTAdaptError as error:
        raise RefusedCalibration(str(error)) from error
    with StreamAdapter(subject.model, branch, calibration=found, config=CALIBRATED) as adapter:
        finite(adapter.step(stills[0]))
        if adapter.drift is None:
            raise Broken("a calibrated stream has no drift")
    if left := before.differences(subject.model):
        raise Broken(f"a calibrated stream left {', '.join(left)}")


class RefusedCalibration(Exception):
    """The library refuses to calibrate this model; the message is its reason."""


CHECKS: dict[str, Callable[[Subject, MAEBranch, Snapshot], None]] = {
    "attach": check_attached,
    "masks": check_masks,
    "gradients": check_gradients,
    "stream": check_stream,
    "lr 0": check_still,
    "calibration": check_calibration,
}


def told(error: BaseException) -> str:
    """An error in one line, with the place that it comes from unless it is the library's own."""
    if isinstance(error, RefusedCalibration):
        return f"refused: {error}"
    if isinstance(error, Broken):
        return str(error)
    text = f"{type(error).__name__}: {without_folders(' '.join(str(error).split()))[:400]}"
    if isinstance(error, TTTAdaptError):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1:]
    return text + "".join(f" (at {'/'.join(p.filename.split('/')[-3:])}:{p.lineno})" for p in place)


def without_folders(text: str) -> str:
    """A text in which absolute paths have their last two parts only: where a machine keeps its files tells nobody."""
    return re.sub(r"(?<![\w.:/])(?:/[\w.+-]+)+(/[\w.+-]+/[\w.+-]+)", r"...\1", text)


def finite(output: Any) -> None:
    """Raise `Broken` where an output holds NaN or infinite values."""
    if not all(bool(t.isfinite().all()) for t in leaves(output) if t.is_floating_point()):
        raise Broken("the prediction is not finite")
