"""The parts that all methods share.

``method`` defines a method and its support set. ``frozen`` has base classes for methods on frozen image
features and for methods on images, ``contexts`` of those that learn prompts, and ``towers`` of those that
train inside CLIP. ``schedules`` tells published from small hyperparameters. ``training`` minimises a loss,
``probe`` fits logistic regression, ``folds`` splits a support set, and ``selection`` chooses hyperparameters
on these folds. ``fitting`` fits a whole method and validates it out of fold, and ``calibration`` turns these
predictions into a temperature and into sets of classes.

Apart from type annotations, the room imports only ``clip.prompt_learning``.
"""
