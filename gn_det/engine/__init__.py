"""Training, pretraining and the demo."""
