"""Stream: one of many streams over one model, by name."""

from __future__ import annotations

from ttt_adapt.errors import ConfigError, StateError
from ttt_adapt.model.threads import one_at_a_time
from ttt_adapt.sharing.model import SharedModel
from ttt_adapt.sharing.video import OneVideo
from ttt_adapt.stream.state import StreamState


class Stream(OneVideo):
    """A stream of its own over the model of an adapter, which other streams share: `adapter.open_stream("cam-3")`.

    It gives what an adapter of its own would give, bit for bit, whatever the others do in between. A call puts the
    stream's weights into the model, in place of those of the stream that was called last.

    Attributes:
        name: of the stream.
    """

    instead = "Open another with adapter.open_stream(name), and give it this one's state_dict()"

    def __init__(self, shared: SharedModel, state: StreamState, name: str) -> None:
        super().__init__(shared, state)
        self.name = name
        self._closed = False

    def __repr__(self) -> str:
        return f"<Stream {self.name!r}{', closed' if self._closed else ''}>"

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def parked(self) -> bool:
        """Whether its state waits away from the device, see `resident` and `park` of `StreamAdapter`."""
        return not self._closed and self._shared.parking.holds(self._held)

    @property
    def _state(self) -> StreamState:
        """The video.

        Raises:
            StateError: the stream is closed.
        """
        if self._closed:
            raise StateError(f"stream {self.name!r} is closed: open another one with adapter.open_stream(name)")
        return self._held

    @one_at_a_time
    def close(self) -> None:
        """Let go of the video; its name is free. All other calls are refused after this; may be called twice."""
        if not self._closed:
            self._closed = True
            self._shared.parking.forget(self._held)
            del self._held

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class OpenStreams:
    """The streams that are open over one model, by name.

    Args:
        shared: the model.
    """

    def __init__(self, shared: SharedModel) -> None:
        self._shared = shared
        self._known: dict[str, Stream] = {}

    @property
    def names(self) -> list[str]:
        """Names of the streams that are open, in the order in which they were opened."""
        return [name for name, stream in self._known.items() if not stream.closed]

    def open(self, name: str) -> Stream:
        """A stream of its own, at its beginning.

        Raises:
            ConfigError: no name.
            StateError: a stream of this name is open, or the model was given back.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of a stream is {name!r}; expected text, such as 'cam-3'")
        if name in self.names:
            raise StateError(f"a stream {name!r} is open: close() it, or choose another name")
        state = self._shared.another()
        self._shared.parking.admit(state)
        self._known = {known: stream for known, stream in self._known.items() if not stream.closed}
        self._known[name] = Stream(self._shared, state, name)
        return self._known[name]

    def close(self) -> None:
        """Close all of them."""
        for stream in self._known.values():
            stream.close()
        self._known = {}
