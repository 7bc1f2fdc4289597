"""Measurements, printed as tables: `make bench`. No test looks at their results."""
