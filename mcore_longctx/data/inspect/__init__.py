"""Looking at packed data, ours or not: verify, show, stats, merge."""
