"""RESULTS.md, its pages, plots and exports."""
