"""Several KV caches that act as one: one decides, the others repeat what it did.

For engines that compute one model on several ranks, each with the K and V of its own heads. The
rank that schedules has a ``PlanningKVCache`` in place of its cache; what it did travels to the
others as ``Operation`` values, small typed messages, and a ``PlanExecutor`` does the same there.
"""

from .ledger import Ledger, take_ledger
from .operations import Operation, decode_plan, encode_plan
from .plan_executor import PlanExecutor
from .planning_cache import PageGrants, PlanningKVCache
from .rank_cache import RankCache

__all__ = [
    "Ledger",
    "Operation",
    "PageGrants",
    "PlanExecutor",
    "PlanningKVCache",
    "RankCache",
    "decode_plan",
    "encode_plan",
    "take_ledger",
]
