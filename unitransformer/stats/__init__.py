"""Raw samples in; medians, intervals, steady state and comparisons out. Plain arithmetic."""
