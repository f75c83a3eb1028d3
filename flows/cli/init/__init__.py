"""``medfocus init``: a folder or a table of images becomes a params file.

``dataset.describe`` reads the images, ``columns`` and ``modality`` guess the settings that the user
leaves open, and ``params_file`` writes the file.
"""
