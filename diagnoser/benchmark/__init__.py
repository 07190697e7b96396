"""The fault benchmark: subjects to train, mistakes to put into them, and the scores of tools."""
