"""diagnoser: finds out why a PyTorch training run goes wrong."""
