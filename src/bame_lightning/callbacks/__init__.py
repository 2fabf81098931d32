"""Lightning callbacks: one per method, over a common driver."""

from bame_lightning.callbacks.bame import BAMECallback
from bame_lightning.callbacks.dense import Dense
from bame_lightning.callbacks.masked import OneShotMagnitude, StaticMask
from bame_lightning.callbacks.rigl import RigL
from bame_lightning.callbacks.straight_through import SRSTE, TransposableSTE
from bame_lightning.callbacks.top_kast import TopKAST

__all__ = ["SRSTE", "BAMECallback", "Dense", "OneShotMagnitude", "RigL", "StaticMask", "TopKAST", "TransposableSTE"]
