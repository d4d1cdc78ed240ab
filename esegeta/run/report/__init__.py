"""What a run shows: one page, and small copies for it."""
