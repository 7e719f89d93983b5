"""Objects that hold a user's model and change it in place: they are neither copied nor pickled."""

from __future__ import annotations

from typing import Any, ClassVar

from ttt_adapt.errors import StateError


class Uncopied:
    """Base class of such objects: `copy.copy`, `copy.deepcopy` and `pickle` raise a StateError.

    Attributes:
        instead: what to do instead, for the message.
    """

    instead: ClassVar[str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: `copy` and `pickle` ask here.

        Raises:
            StateError: always.
        """
        raise StateError(
            f"a {type(self).__name__} cannot be copied or pickled: it changes the weights of a model in place, and a "
            f"copy would change nothing of it. {self.instead}"
        )
