"""Repair that re-measures: finding, plans, trials beside the unrepaired training, keep or not.

`loop` decides, `planning` says what is tried with which numbers, `comparing` what counts as better;
`autotrainer` has another's answers to both.
`forks` makes the trials of a script in copies of its process, `replaying` those of a loop in code
by putting it back and training on the same batches again; `script` puts it together for a
training that is watched. `states` keeps what can be gone back to, `stopping` ends a training.
"""

from diagnoser.repair_loop.autotrainer import AUTOTRAINER
from diagnoser.repair_loop.loop import DIAGNOSER, Runner, Strategy
from diagnoser.repair_loop.planning import Plan, Situation, instructions, plans
from diagnoser.repair_loop.replaying import Feed, Replays, Stream
from diagnoser.repair_loop.script import Mode, ScriptRepairs
from diagnoser.repair_loop.stopping import Stopping

STRATEGIES = {strategy.name: strategy for strategy in (DIAGNOSER, AUTOTRAINER)}

__all__ = [
    "AUTOTRAINER",
    "DIAGNOSER",
    "STRATEGIES",
    "Feed",
    "Mode",
    "Plan",
    "Replays",
    "Runner",
    "ScriptRepairs",
    "Situation",
    "Stopping",
    "Strategy",
    "Stream",
    "instructions",
    "plans",
]
