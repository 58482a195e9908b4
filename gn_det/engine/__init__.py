"""Training, pretraining, evaluation and prediction."""
