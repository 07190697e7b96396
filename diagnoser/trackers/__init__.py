"""Into the tracker that a script uses itself: what was measured, and what was found.

Nothing is imported that the script did not import, and nothing is opened that it did not open. It
is off unless asked for: it writes into somebody's log, which may be shared, paid for, or read by
programs.
"""

from diagnoser.trackers.tracking import Tracking

__all__ = ["Tracking"]
