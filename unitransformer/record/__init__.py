"""The run record: its fields, checksums and derived figures."""
