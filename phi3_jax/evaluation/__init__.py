"""How good a model is: metrics, reports and plots."""
