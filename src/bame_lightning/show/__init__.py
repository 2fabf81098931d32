"""Show runs: maps of masks, comparisons, report pages and workspaces."""
