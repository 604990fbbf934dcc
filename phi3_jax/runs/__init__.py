"""Support for long commands: files replaced as a whole, resuming, progress, plots, memory."""
