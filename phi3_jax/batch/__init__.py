"""Many prompts through a fixed set of compiled programs: requests in, answers out as they finish."""
