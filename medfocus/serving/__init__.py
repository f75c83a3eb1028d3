"""Fitted models in use.

``estimator`` is MedFocusCLIP for scikit-learn, and ``defaults`` has its hyperparameters. ``checkpoint``
saves a fitted method. ``model_folder`` saves all parts of a model, ``predictor`` predicts with them, and
``pyfunc`` is the model that MLflow serves. This room may import explain and every room below it.
"""
