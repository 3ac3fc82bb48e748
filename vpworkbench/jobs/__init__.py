"""Notebooks run by papermill, sweeps, and the table of runs."""
