"""What a step of a model costs, counted from shapes, and what chips can do; nothing is compiled here."""
