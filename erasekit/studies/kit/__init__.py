"""What studies share: records, cached results, erasures, plots."""
