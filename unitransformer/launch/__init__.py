"""Starting ranks, watching them, and stopping them."""
