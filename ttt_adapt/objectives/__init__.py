"""Label-free objectives that a stream can be adapted with."""

from ttt_adapt.objectives.base import Objective, StatefulObjective
from ttt_adapt.objectives.entropy import Entropy
from ttt_adapt.objectives.pseudo_label import PseudoLabel
from ttt_adapt.objectives.rotation import Rotation

__all__ = ["Entropy", "Objective", "PseudoLabel", "Rotation", "StatefulObjective"]
