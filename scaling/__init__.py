"""Studies over run records: what was measured, what follows from it, and how it reads."""
