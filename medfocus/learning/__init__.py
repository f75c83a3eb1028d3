"""The parts that all methods share.

``method`` defines a method and its support set, ``frozen`` the bases of methods on frozen image features and
on images. ``training`` minimises a loss, ``probe`` fits logistic regression, ``folds`` splits a support set,
and ``selection`` chooses hyperparameters on those folds. ``fitting`` fits a whole method and validates it out
of fold.

At run time the room imports no other room.
"""
