"""Is this explanation any good? Functions that judge explanations, in one to three dimensions."""
