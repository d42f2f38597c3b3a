"""Networks in plain torch, one family per file. `catalogue` builds them by name."""
