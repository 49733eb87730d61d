"""Commands around the library: run_all, notebooks, docs, verify, datasets, hub."""
