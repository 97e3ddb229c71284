"""The run record: its schema, checksums, metrics and units."""
