"""Makes a run of a log that a training script wrote itself: what logs alone can tell.

Such a run holds the losses, and what else of `curves.QUANTITIES` the log has, as numbers of the
whole model. No torch here.
"""

from diagnoser.importing.building import Imported, import_log

__all__ = ["Imported", "import_log"]
