"""Models for use: checkpoints, the predictor, MLflow's model, the estimator.

It may import explain, methods and all below.
"""
