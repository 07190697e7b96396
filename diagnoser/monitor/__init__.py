"""The monitor of a training run: interception, schedule, measurements. Nothing of it is changed."""

from diagnoser.monitor.interception import Interception
from diagnoser.monitor.schedule import Plan, Schedule
from diagnoser.monitor.training import Monitor

__all__ = ["Interception", "Monitor", "Plan", "Schedule"]
