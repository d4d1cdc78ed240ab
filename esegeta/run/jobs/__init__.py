"""What a run does: jobs, what they write, and how one is done."""
