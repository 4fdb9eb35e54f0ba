"""Runs: context, teacher runs, manifest, artifacts, summary. Only this package writes into run folders."""
