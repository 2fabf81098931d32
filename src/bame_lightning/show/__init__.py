"""Show runs: maps of masks, comparisons, pages and workspaces."""
