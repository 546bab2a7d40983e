"""What docs/results.md says is measured here: DuoDiff and what one would do instead, on small images."""
