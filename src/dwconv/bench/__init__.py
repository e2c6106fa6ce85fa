"""Measures: timing, suites of real shapes, baselines, results and their report."""
