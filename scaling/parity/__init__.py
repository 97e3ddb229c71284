"""Loss parity: every strategy trains the same model."""
