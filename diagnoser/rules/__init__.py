"""Rules: text files that say which measurements mean which fault, and their evaluation.

`load_rules` reads and checks them, `evaluate` applies them to feature tables, `check_directory`
runs the examples inside each file. No torch here: a rule is tested in a millisecond.
"""

from diagnoser.rules.checking import check_directory
from diagnoser.rules.engine import Judgement, evaluate
from diagnoser.rules.loading import load_rules, shipped_rules_directory
from diagnoser.rules.precision import Precision, precision_of, save_precision
from diagnoser.rules.ranges import Range, Ranges, load_ranges, save_ranges, shipped_ranges
from diagnoser.rules.rule import CHECKS_FAMILY, Rule
from diagnoser.rules.view import since, until

__all__ = [
    "CHECKS_FAMILY",
    "Judgement",
    "Precision",
    "Range",
    "Ranges",
    "Rule",
    "check_directory",
    "evaluate",
    "load_ranges",
    "load_rules",
    "precision_of",
    "save_precision",
    "save_ranges",
    "shipped_ranges",
    "shipped_rules_directory",
    "since",
    "until",
]
