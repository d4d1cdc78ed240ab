"""What a run is told: tables, their loading and checking, and what is built of them."""
