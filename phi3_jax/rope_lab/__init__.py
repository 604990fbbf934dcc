"""Research on rope scalings: comparisons, retrieval tasks, the search of factors, reports and figures."""
