"""The monitor of a training run: interception, schedule, measurements. Nothing of it is changed."""

from diagnoser.monitor.interception import Interception
from diagnoser.monitor.schedule import EVERYTHING, Plan, Schedule
from diagnoser.monitor.training import Monitor

__all__ = ["EVERYTHING", "Interception", "Monitor", "Plan", "Schedule"]
