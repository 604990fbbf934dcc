"""Studies of rope scalings: each is trained, measured and compared with the others, in one resumable run."""
