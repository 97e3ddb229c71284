"""Reading records, sweep outcomes and certificates from folders."""
