"""Networks in plain torch, one family a file; `catalogue` finds them by name."""
