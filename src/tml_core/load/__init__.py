"""Load on a live engine: paced clients with faults, what they saw, and how many fit.

plan:    what every client does and when, worked out before the run from a seed
drive:   does it, on one asyncio loop, and records every tick
report:  latency, misses and slack of a run; the search for the capacity
plot:    a report as a picture (needs matplotlib)
"""

from tml_core.load.drive import Progress, TickOutcome, run_load
from tml_core.load.plan import Arrival, ClientPlan, LoadSpec, make_plan
from tml_core.load.report import Capacity, LoadReport, find_capacity

__all__ = [
    "Arrival",
    "Capacity",
    "ClientPlan",
    "LoadReport",
    "LoadSpec",
    "Progress",
    "TickOutcome",
    "find_capacity",
    "make_plan",
    "run_load",
]
