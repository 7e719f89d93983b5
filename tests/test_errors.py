from __future__ import annotations

from ttt_adapt import TTTAdaptError
from ttt_adapt.errors import ConfigError, EncoderError, StateError


def test_error_types_are_builtins_too():
    for error, builtin in ((ConfigError, ValueError), (EncoderError, ValueError), (StateError, RuntimeError)):
        assert issubclass(error, TTTAdaptError)
        assert issubclass(error, builtin)
