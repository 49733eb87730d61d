"""Commands around the library: run_all, notebooks, docs, verify, datasets, hub."""

import sys

# jsonschema, which nbformat imports, otherwise builds a grammar of web addresses for two seconds in every process.
sys.modules.setdefault("rfc3987_syntax", None)
