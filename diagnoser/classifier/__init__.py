"""A learned judge of runs, next to the rules: verdict, causes and location, from the same features.

`vectors` sums a run up, `reference` knows what is usual for each kind of component, `fitting`
learns, `trees` are what was learned, `predict` judges, `saying` puts it as a finding, `store` keeps
it in a file. scikit-learn is imported only where something is learned; no torch here.
"""

from diagnoser.classifier.fitting import Example, fit, fitted_rows, to_blame
from diagnoser.classifier.predict import Classifier, Prediction, Reason
from diagnoser.classifier.saying import Said, say
from diagnoser.classifier.store import load, save, shipped_classifier, verify
from diagnoser.classifier.vectors import EARLIER, EXCESS, PAIR, Vectors, vectors

__all__ = [
    "EARLIER",
    "EXCESS",
    "PAIR",
    "Classifier",
    "Example",
    "Prediction",
    "Reason",
    "Said",
    "Vectors",
    "fit",
    "fitted_rows",
    "load",
    "save",
    "say",
    "shipped_classifier",
    "to_blame",
    "vectors",
    "verify",
]
