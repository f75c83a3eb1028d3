"""One object for each kind of image encoder and of text tower, with the same verbs for all kinds.

``choose.image_tower`` and ``choose.text_tower`` pick the object. A method or a focus asks ``base.VERBS``
whether a tower can do something, and never for the tower's class. ``vision_transformers``, ``convolutional``
and ``texts`` are the kinds; ``blocks`` and ``low_rank`` change their weights.

This room may import ``medfocus.storage`` and nothing else of the project.
"""
