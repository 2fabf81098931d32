"""Command-line tools: each module is one command."""
