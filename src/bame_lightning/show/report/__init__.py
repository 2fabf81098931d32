"""One self-contained HTML page on a run or a sweep."""
