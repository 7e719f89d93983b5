"""`serve`: a checkpoint behind HTTP, until a signal ends it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, missing
from ttt_adapt.evaluation.adapt_video import loaded, start_runner
from ttt_adapt.evaluation.runners.streaming import Adapting
from ttt_adapt.serve.access import check_access
from ttt_adapt.serve.app import make_app
from ttt_adapt.serve.limits import Limits
from ttt_adapt.serve.service import Service
from ttt_adapt.serve.sources import AllowedSources
from ttt_adapt.serve.streams import Size
from ttt_adapt.view.terminal import notice

TOKEN_VARIABLE = "TTT_ADAPT_TOKEN"
"""The environment variable that holds the token where no file is named."""
GRACE = 30
"""Seconds that requests in work have after a signal."""


def serve(
    checkpoint: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    size: Size = None,
    limits: Limits | None = None,
    sources: Path | None = None,
    source_url: Sequence[str] = (),
    config: StreamConfig | None = None,
    arm: str | None = None,
    changes: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Serve the streams of one checkpoint until SIGTERM or Ctrl-C, which let the frames in work be finished.

    Args:
        checkpoint: a file of `ttt-adapt train`.
        host: where to listen. Another one than this machine itself needs a token.
        port: 0: any that is free; it is said which.
        token: that clients bring; None: no token.
        size: (H, W) at which the model sees frames; "native": their own; None: as for `adapt_video`.
        limits: what clients may ask for.
        sources: folder whose files clients may name as a source; None: no files.
        source_url: what addresses that clients may name begin with.
        config: how to adapt, as for `adapt_video`.
        arm: that adapts, as for `adapt_video`.
        changes: as for `adapt_video`.
        device: where to run.

    Raises:
        ConfigError, CheckpointError: the arguments do not fit together, the arm has no streams of its own, or the host
            needs a token.
        MissingPackageError: a package of the extra "serve" is not installed.
        OSError: the port cannot be used.
    """
    check_access(host, token)
    try:
        import uvicorn
    except ImportError as error:
        raise missing("uvicorn", "serve") from error
    allowed = AllowedSources(sources, source_url)
    model = loaded(checkpoint, None, arm, device)
    with closing(start_runner(model, config, arm, changes)) as runner:
        if not isinstance(runner, Adapting):
            raise ConfigError(f"arm is {arm!r}, which keeps one video only; expected online, calibrated, tent, ...")
        service = Service(model, runner.adapter, size, limits or Limits(), allowed)
        try:
            app = make_app(service, token)
            with _listening(host, port) as door:
                notice(f"serving {checkpoint} on http://{_shown(host)}:{door.getsockname()[1]}")
                settings = uvicorn.Config(
                    app, log_level="warning", access_log=False, ws="none", proxy_headers=False, server_header=False,
                    timeout_graceful_shutdown=GRACE, lifespan="on",
                )  # fmt: skip
                uvicorn.Server(settings).run(sockets=[door])
        finally:
            service.streams.stop_sources()
            service.worker.close()


def read_token(file: Path | None) -> str | None:
    """The token in a file, or in the environment variable `TTT_ADAPT_TOKEN`; None where there is neither.

    Raises:
        ConfigError: the file cannot be read.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE)
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"token_file is {file}, which cannot be read ({error})") from error


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), port), family=family)


def _shown(host: str) -> str:
    return f"[{host.strip('[]')}]" if ":" in host else host
