"""The state of a stream as a file, without pickle: what clients keep, and give back."""

from __future__ import annotations

from pathlib import Path

from ttt_adapt.errors import CheckpointError
from ttt_adapt.sharing.state_file import read_state, write_state
from ttt_adapt.sharing.video import OneVideo


def save_stream(stream: OneVideo, path: Path) -> None:
    """Write all of a stream's state.

    Raises:
        StateError, CheckpointError: the model keeps something of this video that cannot be saved.
    """
    write_state(path, stream.state_dict())


def load_stream(stream: OneVideo, path: Path) -> None:
    """Go on where `save_stream` was called; a file that does not fit changes nothing.

    Raises:
        CheckpointError: the file is damaged, or of another model or configuration.
    """
    try:
        state = read_state(path)
    except CheckpointError as error:
        raise CheckpointError(
            "the body is no state of a stream: it is damaged or something else; expected the bytes that GET gave here"
        ) from error
    stream.load_state_dict(state)
