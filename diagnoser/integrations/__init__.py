"""One thin file for each framework that owns the training loop; none is imported by diagnoser."""
