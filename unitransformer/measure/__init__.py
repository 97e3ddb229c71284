"""What watches a run: the clock of its steps, and the instruments around it."""
