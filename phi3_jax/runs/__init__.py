"""What long commands share: files that change as a whole, resuming, progress, plots, memory."""
