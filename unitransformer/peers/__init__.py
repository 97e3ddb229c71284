"""Networks that a user could train instead of this one, and a worker that trains each."""
