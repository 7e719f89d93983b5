"""Label-free objectives to adapt a model with, and the protocols and base classes to write one with."""

from ttt_adapt.objectives.base import Attached, Objective, OutputObjective, SplitLoss, StatefulObjective
from ttt_adapt.objectives.entropy import Entropy
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.objectives.pseudo_label import PseudoLabel
from ttt_adapt.objectives.rotation import Rotation

__all__ = [
    "Attached",
    "Entropy",
    "MAEBranch",
    "Objective",
    "OutputObjective",
    "PseudoLabel",
    "Rotation",
    "SplitLoss",
    "StatefulObjective",
]
