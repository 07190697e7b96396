"""Repair that re-measures: finding, plans, trials beside the unrepaired training, keep or not.

`loop` decides, `planning` says what is tried with which numbers, `comparing` what counts as better.
`forks` makes the trials of a script in copies of its process; `script` puts it together for a
training that is watched.
"""

from diagnoser.repair_loop.loop import AUTOTRAINER, DIAGNOSER, STRATEGIES, Strategy
from diagnoser.repair_loop.planning import Plan, Situation, instructions, plans
from diagnoser.repair_loop.script import Mode, ScriptRepairs

__all__ = [
    "AUTOTRAINER",
    "DIAGNOSER",
    "STRATEGIES",
    "Mode",
    "Plan",
    "ScriptRepairs",
    "Situation",
    "Strategy",
    "instructions",
    "plans",
]
