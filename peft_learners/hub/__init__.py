"""Model cards of adapters."""
